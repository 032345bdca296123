"""Rows of tokens on disk: packed from a corpus before a stage trains, and read as they are needed."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flashmorph.chat import Unfit, encode_chat
from flashmorph.corpus import Corpus, Document, Mixture, Place, no_text, shares_of
from flashmorph.errors import UserError
from flashmorph.files import write_json
from flashmorph.progress import Report, silent
from flashmorph.special_tokens import before_text, count_before, room_for_text

PARTIAL = ".partial"
_ROWS, _POSITION = "rows.npy", "position.json"
_FIRST, _IGNORED = np.uint32(1 << 31), np.uint32(1 << 30)
_TOGETHER = 200_000
_KEEP_TOKENS = 1 << 22
_ENOUGH_UNFIT = 1_000
_LOG = logging.getLogger(__name__)


class Rows(Dataset[dict[str, list[int]]]):
    """Rows of token ids `[rows, length]`, mapped from a file and read as they are needed.

    The highest bit of an id marks the first token of a document; `starts` are the places of those tokens in a row, its
    first among them. The next bit marks a token that is read but not learnt; `ignored` are the places of those. Each
    document begins with the special tokens that the tokenizer puts before a text, and so does the rest of one at the
    start of a row. They are not learnt, nor is the first token of such a rest, which nothing before it announces.
    """

    def __init__(self, path: Path):
        self._ids = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        stored = self._ids[row]
        places = np.flatnonzero(stored[1:] & _FIRST) + 1
        return {
            "input_ids": (stored & ~(_FIRST | _IGNORED)).tolist(),
            "starts": [0, *places.tolist()],
            "ignored": np.flatnonzero(stored & _IGNORED).tolist(),
        }

    def mean_context(self, apart: bool) -> float:
        """The tokens before a token that it can attend to, on average; `apart`: documents do not see each other."""
        length = self._ids.shape[1]
        if not apart:
            return (length - 1) / 2
        pairs, at_once = 0, max(1, _KEEP_TOKENS // length)
        for row in range(0, len(self), at_once):
            begins = self._ids[row : row + at_once] & _FIRST != 0
            begins[:, 0] = True
            sizes = np.diff(np.flatnonzero(begins), append=begins.size)
            pairs += int((sizes * (sizes - 1) // 2).sum())
        return pairs / self._ids.size


class _TooLittle(UserError):
    """The text would have to be repeated too often: what is packed already is of no use."""


def pack(
    corpus: Corpus | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    length: int,
    rows: int,
    seed: int,
    path: Path,
    max_passes: int | None = 4,
    report: Report = silent,
    others: Sequence[list[int]] = (),
    long_documents: bool = False,
) -> Rows:
    """Tokenise documents of `split`, join them end to end and cut rows of `length` tokens into the file `path`.

    Where documents begin is kept, so that training can hold them apart (`packing.py`), and which tokens of
    conversations are learnt. With `long_documents` only those are taken that fill a row on their own, each as many
    whole rows as it fills. `others` are rows of that length that stand among those of text at regular intervals, made
    when it is their turn. The rows are on disk before training starts: any step can be resumed at without reading the
    text again. An existing file is taken as it is.

    Until it is whole, the file stands in a folder of its own (`.partial`) beside the place in the text that it has come
    to. Packing that was killed goes on from there, and ends with the same file.

    Raises:
        UserError: the text would have to be repeated more than `max_passes` times (None: as often as it takes), cannot
            be read, has conversations that the tokenizer has no template for or no document that is long enough, or the
            place cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    if not path.exists():
        needed = (rows - len(others)) * length
        text = _Text(corpus, tokenizer, split, seed, max_passes, needed, length, long_documents)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _write(partial, text, others, (rows, length), report)
            os.replace(partial / _ROWS, path)
        except BaseException as error:
            if isinstance(error, _TooLittle) or not (partial / _POSITION).exists():
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"cannot write {path}: {error.strerror}") from error
            raise
        text.tell()
    shutil.rmtree(partial, ignore_errors=True)
    return Rows(path)


def _write(partial: Path, text: "_Text", others: Sequence[list[int]], shape: tuple[int, int], report: Report) -> None:
    """Write the rows into `partial`, from the place kept there on."""
    rows, length = shape
    kept = _kept(partial, length)
    done = text.restore(kept) if kept else 0
    free, wanted = shutil.disk_usage(partial).free, 4 * (rows - done) * length
    if wanted > free:
        raise UserError(f"{partial.parent} has {free:,} bytes free and the rows of text need {wanted:,}: free some")
    others_before = np.arange(rows + 1) * len(others) // rows
    every = max(1, _KEEP_TOKENS // length)
    with open(partial / _ROWS, "r+b" if done else "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<u4", "fortran_order": False, "shape": shape})
        stream.seek(4 * done * length, os.SEEK_CUR)
        for row in range(done, rows):
            number = int(others_before[row])
            ids = others[number] if others_before[row + 1] > number else text.take()
            stream.write(np.asarray(ids, "<u4").tobytes())
            report(row + 1, rows)
            if (row + 1) % every == 0 or row + 1 == rows:
                stream.flush()
                os.fsync(stream.fileno())
                write_json(partial / _POSITION, {"datasets": datasets.__version__, "rows": row + 1, **text.state()})


def _kept(partial: Path, length: int) -> dict[str, Any] | None:
    """The position that interrupted packing can go on from, if there is one.

    Another version of `datasets` may read in another order: then packing begins again.
    """
    try:
        kept = json.loads((partial / _POSITION).read_text())
        whole = (partial / _ROWS).stat().st_size >= 4 * kept["rows"] * length
    except (OSError, ValueError):
        return None
    return kept if whole and kept["datasets"] == datasets.__version__ else None


class _Text:
    """Running text as rows of `length` tokens, of each corpus its share; it knows where it stands."""

    def __init__(
        self,
        corpus: Corpus | Mixture,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        seed: int,
        max_passes: int | None,
        needed: int,
        length: int,
        long_documents: bool,
    ):
        before = before_text(tokenizer)
        room_for_text(length, before)
        whole_rows = length if long_documents else None
        self._parts = [
            Part(part, share, tokenizer, split, seed, max_passes, round(share * needed), whole_rows)
            for part, share in shares_of(corpus)
        ]
        self._length, self._left = length, np.empty(0, np.uint32)
        self._before = _marked(before, None, before) if before else self._left

    def take(self) -> np.ndarray:
        """The next row; the next document is always of the corpus that lags most behind its share.

        The rest of a document is read as a text of its own: it begins with the special tokens too.
        """
        self._gather(1)
        is_rest = bool(len(self._before)) and not self._left[0] & _FIRST
        room = self._length - (len(self._before) if is_rest else 0)
        self._gather(room)
        unread = self._unread(room)
        taken, self._left = self._left[:room], self._left[room + unread :]
        if not is_rest:
            return taken
        row = np.concatenate([self._before, taken])
        row[len(self._before)] |= _IGNORED
        return row

    def _unread(self, room: int) -> int:
        """Of a document whose special tokens do not all fit at the end of a row: those that the next row begins with
        anyway."""
        size = len(self._before)
        for begin in range(max(0, room - size + 1), room):
            if self._left[begin] & _FIRST:
                self._gather(begin + size)
                if (self._left[begin : begin + size] == self._before).all():
                    return begin + size - room
        return 0

    def _gather(self, number: int) -> None:
        """Have at least so many tokens ready."""
        while len(self._left) < number:
            part = min(self._parts, key=lambda part: part.made / part.share)
            self._left = np.concatenate([self._left, part.next()])

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        return {"left": self._left.tolist(), "parts": [part.state() for part in self._parts]}

    def restore(self, kept: dict[str, Any]) -> int:
        """Go on from a state; the rows that were written until then."""
        self._left = np.array(kept["left"], np.uint32)
        for part, state in zip(self._parts, kept["parts"], strict=True):
            part.restore(state)
        return kept["rows"]

    def tell(self) -> None:
        """Say what was left out."""
        for part in self._parts:
            part.tell()


class Part:
    """One corpus, pass after pass: `made` tokens so far, of about `needed`.

    The tokenizer's special tokens stand before each text and the end-of-text token behind it; a conversation has the
    tokens of its chat template. With `whole_rows`, the length of a row, only documents are given that fill rows on
    their own, each as far as it fills them.
    """

    def __init__(
        self,
        corpus: Corpus,
        share: float,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        seed: int,
        max_passes: int | None = 1,
        needed: int = 0,
        whole_rows: int | None = None,
    ):
        self.share, self.made = share, 0
        self._corpus, self._tokenizer, self._split, self._seed = corpus, tokenizer, split, seed
        self._max_passes, self._needed, self._whole_rows = max_passes, needed, whole_rows
        self._before = before_text(tokenizer)
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._passes, self._made_before, self._unfit, self._reason = 0, 0, 0, ""
        self._place = Place()
        self._documents: Iterator[tuple[np.ndarray, Place]] | None = None

    def once(self) -> Iterator[list[int]]:
        """The tokens of each document of one pass, no text twice.

        Raises:
            UserError: there is none, or the corpus cannot be read.
        """
        for tokens, _ in self._encoded(_no_text_twice(self._corpus.read(self._split, self._seed))):
            self.made += len(tokens)
            yield (tokens & ~(_FIRST | _IGNORED)).tolist()
        if not self.made:
            raise self._no_text()

    def next(self) -> np.ndarray:
        """The tokens of the next document, marked."""
        while True:
            if self._documents is None:
                self._begin_pass()
            assert self._documents is not None
            found = next(self._documents, None)
            if found is not None:
                tokens, self._place = found
                self.made += len(tokens)
                return tokens
            if self.made == self._made_before:
                raise self._none_so_long() if self._whole_rows and not self._unfit else self._no_text()
            self._passes, self._made_before = self._passes + 1, self.made
            self._place, self._documents = Place(), None

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        return {
            "made": self.made,
            "made_before": self._made_before,
            "passes": self._passes,
            "unfit": [self._unfit, self._reason],
            "place": asdict(self._place),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.made, self._made_before, self._passes = state["made"], state["made_before"], state["passes"]
        self._unfit, self._reason = state["unfit"]
        self._place = Place(**state["place"])

    def tell(self) -> None:
        """Say how many conversations were left out, if any."""
        if self._unfit:
            _LOG.warning("%s: %d conversations were left out: %s", self._corpus.source, self._unfit, self._reason)

    def _begin_pass(self) -> None:
        if self._passes == self._max_passes:
            long = f" in documents of at least {self._whole_rows:,}" if self._whole_rows else ""
            raise _TooLittle(
                f"{self._corpus.source} is too small: it has about {self.made // self._passes:,} tokens{long} for the "
                f"split {self._split!r} and {self._needed:,} are needed, more than {self._max_passes} times that; give "
                "more --data, fewer tokens, or --allow-repeat"
            )
        documents = self._corpus.read(self._split, self._seed + self._passes, self._place)
        self._documents = self._encoded(documents)

    def _encoded(self, documents: Iterator[tuple[Document, Place]]) -> Iterator[tuple[np.ndarray, Place]]:
        """Marked tokens of each document, texts tokenised many together, since that is faster."""
        while together := _some(documents):
            texts = [document.text for document, _ in together if document.messages is None]
            if texts and self._corpus.replies_only:
                raise UserError(f"{self._corpus.source} has text, and `loss_on: replies` is for conversations")
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
            of_texts = iter(encoded)
            for document, place in together:
                if document.messages is None:
                    ids, learnt = [*self._before, *next(of_texts), *self._end], None
                else:
                    ids, learnt = self._encode_chat(document)
                if ids and (size := self._taken_of(len(ids))):
                    yield _marked(ids, learnt, self._before)[:size], place

    def _taken_of(self, tokens: int) -> int:
        """How many of a document's tokens are given. In each row but the first, special tokens stand before them."""
        if not self._whole_rows:
            return tokens
        room = self._whole_rows - len(self._before)
        return self._whole_rows + (tokens - self._whole_rows) // room * room if tokens >= self._whole_rows else 0

    def _encode_chat(self, document: Document) -> tuple[list[int], list[bool] | None]:
        """The tokens of a conversation; none if the template refuses it."""
        require_template(self._tokenizer, self._corpus)
        assert document.messages is not None
        try:
            return encode_chat(self._tokenizer, document.messages, self._corpus.replies_only)
        except Unfit as error:
            self._unfit, self._reason = self._unfit + 1, str(error)
            if self._unfit >= _ENOUGH_UNFIT and not self.made:
                raise self._no_text() from error
            return [], None

    def _none_so_long(self) -> UserError:
        return UserError(
            f"{self._corpus.source} has no document of {self._whole_rows:,} tokens or more in the split "
            f"{self._split!r}: give longer documents, a shorter length, or `documents: joined`"
        )

    def _no_text(self) -> UserError:
        if not self._unfit:
            return no_text(self._corpus, self._split)
        way_out = "; `loss_on: all` needs no replies to be found" if self._corpus.replies_only else ""
        return UserError(
            f"{self._corpus.source}: the teacher's chat template takes none of the {self._unfit:,} conversations that "
            f"were tried: {self._reason}{way_out}"
        )


def require_template(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """Refuse conversations for a teacher that has no words for them.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{corpus.source} has conversations and the teacher's tokenizer has no chat template: give text, or an "
            "instruction-tuned teacher"
        )


def _some(documents: Iterator[tuple[Document, Place]]) -> list[tuple[Document, Place]]:
    """The next documents, of `_TOGETHER` characters or a little more."""
    some, size = [], 0
    while size < _TOGETHER and (found := next(documents, None)):
        some.append(found)
        size += len(found[0].text)
    return some


def _no_text_twice(documents: Iterator[tuple[Document, Place]]) -> Iterator[tuple[Document, Place]]:
    """Each text once, however often the corpus has it."""
    seen: set[bytes] = set()
    for document, place in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document, place


def _marked(ids: list[int], learnt: list[bool] | None, before: list[int]) -> np.ndarray:
    """The tokens of a document with their marks; what stands before the text is read, not learnt."""
    tokens = np.array(ids, np.uint32)
    tokens[0] |= _FIRST
    if learnt is not None:
        tokens[~np.array(learnt)] |= _IGNORED
    tokens[: count_before(ids, before)] |= _IGNORED
    return tokens
