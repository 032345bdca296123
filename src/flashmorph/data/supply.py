"""The amount of local text before any is packed: the splits that have some, and the most tokens that they have.

Read is no more than it takes to know that there is enough, or a sample; then sizes of files tell the most that there
can be. Nothing is fetched.
"""

import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from flashmorph.data.corpus import Corpus, files_of
from flashmorph.data.documents import require_words
from flashmorph.data.formats import Document
from flashmorph.data.textfiles import PARQUET, kind_of, parquet_rows

_TOKENISED = 2_000_000
"""Characters of the split `train` that are tokenised, if there are so many."""
_READ = 16_000_000
"""Characters that are read in search of a document of each split."""
_TOGETHER = 100_000
_SAMPLE = 1 << 22
_MARGIN = 1.5
"""How much more text there may be than a sample suggests: no text is refused that could be enough."""
_AROUND = 32
"""Tokens that a chat template puts around each message, at most."""
_OPEN: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open}
_MOST_COMPRESSED = 20
"""The most that text can be longer than its compressed file (zst)."""


class Supply(NamedTuple):
    """`splits` that a document was seen of; `tokens` of the split `train` in one pass, at most.

    `whole`: all text was read, so what was not seen is not there. `likely` is `tokens` without the margins.
    """

    splits: set[str]
    tokens: float
    whole: bool
    likely: int


def measure(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, enough: float, splits: set[str]) -> Supply:
    """The amount of text in a local corpus, read until there are `enough` tokens and each of `splits` has a document.

    Raises:
        UserError: the text cannot be read, or is no text, or no conversation, where that is needed.
    """
    seen: set[str] = set()
    sample = _Sample(tokenizer)
    read = size = rows = of_train = 0
    for document in corpus.every():
        require_words(tokenizer, corpus, document)
        split, characters = document.split, len(document.text)
        seen.add(split)
        rows, read, size = rows + 1, read + characters, size + len(document.text.encode())
        if split == "train":
            of_train += characters
            sample.add(document)
        if (sample.tokens >= enough or sample.is_full) and (seen >= splits or read >= _READ):
            if sample.tokens >= enough:
                return Supply(seen, sample.tokens, False, int(sample.tokens))
            most = _at_most(corpus, sample.share(of_train), rows, size)
            return Supply(seen, most, False, sample.likely(most))
    most = sample.share(of_train)
    return Supply(seen, most, True, sample.likely(most))


class _Sample:
    """The first documents that it is given, and their tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokens, self._characters, self._around = 0, 0, 0
        self._tokenizer, self._waiting = tokenizer, []

    @property
    def is_full(self) -> bool:
        """Whether it takes no more."""
        return self._characters >= _TOKENISED

    def add(self, document: Document) -> None:
        """Take one more; they are tokenised many together, since that is faster."""
        if self.is_full:
            return
        self._characters += len(document.text)
        around = _AROUND * (1 + len(document.messages)) if document.messages else 2
        self.tokens, self._around = self.tokens + around, self._around + around
        self._waiting.append(document.text)
        if self.is_full or sum(map(len, self._waiting)) >= _TOGETHER:
            self._count()

    def share(self, characters: int) -> float:
        """Tokens of so many characters of which these are the first: all counted, or at most."""
        self._count()
        if characters <= self._characters:
            return self.tokens
        return _MARGIN * self.tokens / self._characters * characters

    def likely(self, tokens: float) -> int:
        """Of so many tokens at most, those that there are without margins, and none around texts and messages."""
        estimated = _MARGIN if self.is_full else 1
        return int(tokens / estimated * (1 - self._around / max(1, self.tokens))) if tokens < float("inf") else 0

    def _count(self) -> None:
        if self._waiting:
            found: Any = self._tokenizer(self._waiting, add_special_tokens=False, verbose=False).input_ids
            self.tokens += sum(map(len, found))
        self._waiting = []


def _at_most(corpus: Corpus, tokens: float, rows: int, size: int) -> float:
    """The most tokens that all files can have, where `rows` documents of `size` bytes have so many."""
    files = files_of(corpus)
    if not files:
        return float("inf")  # Of the demo text a sample is all that is needed.
    if any(kind_of(file) == PARQUET for file in files):
        return _MARGIN * tokens / rows * sum(map(parquet_rows, files))
    return _MARGIN * tokens / size * sum(map(_plain_bytes, files))


def _plain_bytes(file: Path) -> float:
    """Bytes of a file without compression, by a sample of it."""
    size = file.stat().st_size
    ending = file.suffix.lower()
    if ending == ".zst":
        return _MOST_COMPRESSED * size
    if ending not in _OPEN:
        return size
    with file.open("rb") as raw, _OPEN[ending](raw) as plain:
        read = sum(map(len, _blocks(plain)))
        return size * read / max(1, raw.tell())


def _blocks(stream: Any) -> Iterator[bytes]:
    left = _SAMPLE
    while left > 0 and (block := stream.read(1 << 16)):
        left -= len(block)
        yield block
