"""Held-out text for perplexity: each document by itself and none twice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from flashmorph.data.corpus import Corpus, Mixture, no_text, shares_of
from flashmorph.data.documents import Part
from flashmorph.errors import UserError
from flashmorph.files import atomic_path
from flashmorph.losses import Head, token_losses
from flashmorph.tokens.special_tokens import before_text, count_before, room_for_text

_ARRAYS = ("ids", "sizes", "documents", "special", "asked")


class Batch(NamedTuple):
    """Pieces of one forward.

    `ids` `[pieces, time]` are padded on the right, which causal layers do not see; `predicted` `[pieces, time]` is True
    at each token that is predicted; `positions` `[tokens]` are the indices of those among all predicted tokens.
    """

    ids: torch.Tensor
    predicted: torch.Tensor
    positions: np.ndarray

    def losses(self, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        """The cross-entropy in nats of each predicted token, in the order of `positions`, `[tokens]`.

        `hidden` are the last hidden states of `ids`, `[pieces, time, width]`.
        """
        return token_losses(hidden[:, :-1][self.predicted[:, 1:]], head, self.ids[self.predicted])


@dataclass(frozen=True)
class HeldOut:
    """Text in pieces that are scored separately: a document, or a window of one that is longer than `length` tokens.

    Every piece begins with the special tokens that the tokenizer puts before a text, `special` of them; they are not
    predicted, nor is a first token, which has no context. `documents` has the number of each piece's document. The text
    has `tokens` tokens, of `wanted`.
    """

    pieces: list[list[int]]
    documents: list[int]
    special: list[int]
    length: int
    wanted: int

    @property
    def tokens(self) -> int:
        """Tokens of text, without the special ones before it."""
        return sum(map(len, self.pieces)) - sum(self.special)

    @cached_property
    def firsts(self) -> list[int]:
        """The index of the first predicted token of each piece."""
        return [max(1, special) for special in self.special]

    @cached_property
    def offsets(self) -> np.ndarray:
        """Offsets `[pieces + 1]` of each piece among all predicted tokens, and their number."""
        sizes = [len(piece) - first for piece, first in zip(self.pieces, self.firsts, strict=True)]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def in_batches(self, batch_tokens: int) -> list[list[int]]:
        """The numbers of all pieces, the longest first, in batches of at most `batch_tokens` or of one piece.

        The pieces of a batch are at least half as long as its longest, so less than half of it is padding.
        """
        order = sorted(range(len(self.pieces)), key=lambda piece: -len(self.pieces[piece]))
        batches: list[list[int]] = []
        longest = 0
        for piece in order:
            size = len(self.pieces[piece])
            if not batches or (len(batches[-1]) + 1) * longest > batch_tokens or 2 * size < longest:
                batches.append([])
                longest = size
            batches[-1].append(piece)
        return batches

    def batch(self, numbers: Sequence[int], device: torch.device) -> Batch:
        """The pieces with these `numbers`, padded."""
        rows = [torch.tensor(self.pieces[number], device=device) for number in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        time = torch.arange(ids.shape[1], device=device)
        first = torch.tensor([self.firsts[number] for number in numbers], device=device)
        size = torch.tensor([len(row) for row in rows], device=device)
        positions = [np.arange(self.offsets[number], self.offsets[number + 1]) for number in numbers]
        return Batch(ids, (time >= first[:, None]) & (time < size[:, None]), np.concatenate(positions))

    def save(self, path: Path) -> None:
        """Write it to `path` atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                ids=np.concatenate([np.array(piece, np.uint32) for piece in self.pieces]),
                sizes=[len(piece) for piece in self.pieces],
                documents=self.documents,
                special=self.special,
                asked=[self.length, self.wanted],
            )

    @classmethod
    def load(cls, path: Path) -> "HeldOut":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, truncated or of another kind.
        """
        try:
            with np.load(path) as kept:
                ids, sizes, documents, special, asked = (kept[name] for name in _ARRAYS)
        except Exception as error:  # Reading an archive of arrays fails in many ways.
            raise UserError(f"{path} is damaged: it cannot be read") from error
        whole = all(each.ndim == 1 and each.dtype.kind in "iu" for each in (ids, sizes, documents, special, asked))
        if not whole or not len(sizes) == len(documents) == len(special) or sum(sizes.tolist()) != len(ids):
            raise UserError(f"{path} is damaged: its parts are of different texts")
        if not len(sizes) or len(asked) != 2 or (sizes <= np.maximum(special, 1)).any():
            raise UserError(f"{path} is damaged: it has a piece without text")
        pieces = np.split(ids.astype(np.int64), np.cumsum(sizes)[:-1])
        return cls([piece.tolist() for piece in pieces], documents.tolist(), special.tolist(), *asked.tolist())


def hold_out(
    corpus: Corpus | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    length: int,
    tokens: int,
    seed: int,
    long_documents: bool = False,
) -> HeldOut:
    """`tokens` tokens of the documents of `split` in pieces, or all text of the split if it has less.

    Args:
        corpus: The text; of a mixture, each source gives its share as long as it has text.
        tokenizer: The teacher's.
        split: Documents of this split only.
        length: The most tokens of a piece.
        tokens: Tokens of text in all.
        seed: Of the order of documents.
        long_documents: Only use documents that fill a piece on their own, each for as many pieces as it fills.

    Raises:
        UserError: a source has no text in this split, none that is long enough, or cannot be read; or special tokens
            fill `length`.
    """
    before = before_text(tokenizer)
    whole = length if long_documents else None
    parts = [Part(part, share, tokenizer, split, seed, whole_rows=whole) for part, share in shares_of(corpus)]
    pieces: list[list[int]] = []
    documents: list[int] = []
    special: list[int] = []
    left = tokens
    for number, document in enumerate(_in_turns(parts)):
        own = count_before(document, before)
        document = document[: own + left]
        left -= len(document) - own
        for piece in _windows(document, length, before):
            leading = count_before(piece, before)
            if len(piece) > max(1, leading):
                pieces.append(piece)
                documents.append(number)
                special.append(leading)
        if left <= 0:
            break
    for part in parts:
        part.report_left_out()
    if not pieces:
        raise no_text(shares_of(corpus)[0][0], split)
    return HeldOut(pieces, documents, special, length, tokens)


def _in_turns(parts: Sequence[Part]) -> Iterator[list[int]]:
    """The tokens of each document; the next is always of the corpus that lags most behind its share."""
    unread = {part: part.once() for part in parts}
    while unread:
        part = min(unread, key=lambda part: part.made / part.share)
        if (document := next(unread[part], None)) is None:
            del unread[part]
        else:
            yield document


def _windows(document: list[int], length: int, before: list[int]) -> Iterator[list[int]]:
    """A document in windows of at most `length` tokens, each beginning with the special tokens `before`."""
    yield document[:length]
    room = room_for_text(length, before)
    for start in range(length, len(document), room):
        yield [*before, *document[start : start + room]]
