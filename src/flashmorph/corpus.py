"""Text: where it comes from, its four disjoint splits, and where a reader of it stands."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from flashmorph.chat import CHAT_COLUMNS, Message, messages_in, spoken
from flashmorph.errors import UserError
from flashmorph.files import content_digest
from flashmorph.tasks.words import SPLITS

DEMO = "demo"
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_HELD_OUT_SHARES = {"validation": 0.05, "referee": 0.05, "test": 0.05}
_BLOCK = 1_000
_POOL_CHARACTERS = 8_000_000
_LONG, _PIECE = 60_000, 20_000
_FIRST_ROWS = 100
_DIGESTED, _LEAST_DIGESTED = 1 << 28, 1 << 20
"""Bytes that are read to know local text again: of all files together, and of each at least."""


def split_of(text: str) -> str:
    """The split that a document belongs to, from the digest of its text alone: no order or seed can move it."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    for split, share in _HELD_OUT_SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


@dataclass(frozen=True)
class Document:
    """A text, or a conversation: then `text` is what is said in it."""

    text: str
    messages: list[Message] | None = None


@dataclass(frozen=True)
class Place:
    """Where a pass over a corpus stands, as JSON values.

    `reader` is the state of the stream in front of a block of rows, `blocks` the number of blocks before it, `given`
    the number of documents that it has given.
    """

    reader: dict[str, Any] | None = None
    blocks: int = 0
    given: int = 0


@dataclass(frozen=True)
class Corpus:
    """Documents from the shipped demo text, local files or a dataset of the Hugging Face hub.

    `source` is `demo`, a file, a folder of files (txt, md, jsonl, json, parquet, each also compressed as xz, gz or
    zst) or the name of a dataset, which is streamed; `config` and `column` belong to the latter two, `split` to a
    dataset. A txt or md file is one document, unless it is long: then it is cut at empty lines, so that one big file
    has all splits too. A row is a conversation where `column` holds one, or where there is no such column but one of
    `CHAT_COLUMNS`; `replies_only`: of conversations, only the assistant's words are learnt.
    """

    source: str = DEMO
    config: str | None = None
    column: str = "text"
    split: str = "train"
    replies_only: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether its settings alone say that it has conversations."""
        return self.replies_only or self.column in CHAT_COLUMNS

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The text of one pass over the documents of `split`; see `read`."""
        return (document.text for document, _ in self.read(split, seed))

    def read(self, split: str, seed: int, place: Place | None = None) -> Iterator[tuple[Document, Place]]:
        """One pass over the documents of `split`, from `place` on, each with the place behind it.

        The files of a source are read in turns, in an order that `seed` shuffles, and each `_BLOCK` rows are shuffled
        among themselves. So a place needs no more than the stream's own state: `datasets` shuffles through a buffer
        whose content is lost when a stream goes on from its state.

        Raises:
            ValueError: `split` is unknown.
            UserError: nothing readable at `source`, or it has no column of that name.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        whole_files = self.source != DEMO and _reader_of(Path(self.source)) == "text"
        for block, at in self._blocks(seed, place or Place()):
            texts = (document for row in block for document in self._documents_in(row, whole_files))
            wanted = (document for document in texts if document.text and split_of(document.text) == split)
            for number, document in enumerate(islice(wanted, at.given, None), at.given + 1):
                yield document, Place(at.reader, at.blocks, number)

    def every(self) -> Iterator[Document]:
        """One pass over the documents of all splits; see `read`."""
        whole_files = self.source != DEMO and _reader_of(Path(self.source)) == "text"
        for block, _ in self._blocks(0, Place()):
            for row in block:
                yield from (document for document in self._documents_in(row, whole_files) if document.text)

    def _blocks(self, seed: int, place: Place) -> Iterator[tuple[list[dict[str, Any]], Place]]:
        """Shuffled blocks of rows, each with its place; whatever a reader stumbles over becomes one sentence."""
        order = np.random.default_rng(seed)
        for _ in range(place.blocks):
            order.permutation(_BLOCK)
        try:
            stream = self._open().shuffle(seed=seed, buffer_size=1)
            if place.reader:
                stream.load_state_dict(place.reader)
            rows = iter(stream)
            while block := list(islice(rows, _BLOCK)):
                yield [block[number] for number in order.permutation(len(block))], place
                place = Place(stream.state_dict(), place.blocks + 1)
        except UserError:
            raise
        except StopIteration as error:
            raise UserError(f"{self.source} is empty") from error
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.source} cannot be read: {reason}") from error

    def _documents_in(self, row: dict[str, Any], whole_files: bool) -> Iterator[Document]:
        column = next((name for name in (self.column, *CHAT_COLUMNS) if name in row), None)
        if column is None:
            raise UserError(f"{self.source} has no column {self.column!r}; it has {', '.join(map(repr, row))}")
        value = row[column]
        if messages := messages_in(value):
            yield Document(spoken(messages), messages)
        elif value is None or isinstance(value, str):
            yield from (Document(piece) for piece in (_cut(value or "") if whole_files else [value or ""]))
        else:
            raise UserError(f"{self.source}: column {column!r} holds {value!r}, which is neither text nor conversation")

    def pool(self, split: str, seed: int, characters: int = _POOL_CHARACTERS) -> list[str]:
        """Documents of `split` up to about `characters` characters: what haystacks are made of.

        Raises:
            UserError: the corpus has no document in this split.
        """
        pool, size = [], 0
        for document in self.documents(split, seed):
            pool.append(document)
            size += len(document)
            if size >= characters:
                break
        if not pool:
            raise no_text(self, split)
        return pool

    def _open(self) -> datasets.IterableDataset:
        """The stream behind `source`."""
        if self.source == DEMO:
            demo = files("flashmorph") / "assets" / "demo_text.jsonl.xz"
            return datasets.load_dataset("json", data_files=str(demo), split="train", streaming=True)
        path = Path(self.source)
        if path.exists():
            paths, reader = _files(path), _reader_of(path)
            if not reader:
                raise UserError(f"{path} holds no text: give files that end in {', '.join(_READERS)}")
            if any(_reader(file) != reader for file in paths):
                raise UserError(f"{path} holds files of several kinds, such as {paths[0].name}: give one kind")
            options: dict[str, Any] = {"sample_by": "document"} if reader == "text" else {}
            names = [glob.escape(str(file)) for file in paths if _reader(file) == reader]
            return datasets.load_dataset(reader, data_files=names, split="train", streaming=True, **options)
        try:
            return datasets.load_dataset(self.source, self.config, split=self.split, streaming=True)
        except Exception as error:
            raise UserError(
                f"no text at {self.source!r}: it is no local file or folder, and the hub says: "
                f"{str(error).splitlines()[0]}"
            ) from error


@dataclass(frozen=True)
class Mixture:
    """Several corpora, each with its share of the tokens."""

    parts: tuple[Corpus, ...]
    shares: tuple[float, ...]

    def pool(self, split: str, seed: int, characters: int = _POOL_CHARACTERS) -> list[str]:
        """Documents of `split`, of each corpus its share of `characters`; see `Corpus.pool`."""
        sizes = [round(share * characters) for share in self.shares]
        pools = [part.pool(split, seed, size) for part, size in zip(self.parts, sizes, strict=True)]
        return [document for pool in pools for document in pool]


def shares_of(corpus: Corpus | Mixture) -> Sequence[tuple[Corpus, float]]:
    """Each corpus with its share of the tokens."""
    return list(zip(corpus.parts, corpus.shares, strict=True)) if isinstance(corpus, Mixture) else [(corpus, 1.0)]


def is_local(corpus: Corpus) -> bool:
    """Whether its text is on this machine."""
    return corpus.source == DEMO or Path(corpus.source).exists()


def files_of(corpus: Corpus) -> list[Path]:
    """The files that a local corpus is read from; none for the demo text."""
    return [] if corpus.source == DEMO else _files(Path(corpus.source))


def identity_of(corpus: Corpus | Mixture) -> list[dict[str, Any]]:
    """What the text of a corpus depends on, as JSON values, part by part.

    Local text is known by what is in its files and by their names, wherever they lie; a dataset by what names it.
    """
    return [{"share": share, **_identity(part)} for part, share in shares_of(corpus)]


def _identity(part: Corpus) -> dict[str, Any]:
    about: dict[str, Any] = {"source": part.source, "replies_only": part.replies_only}
    path = Path(part.source)
    if part.source == DEMO:
        return about
    if path.exists():
        column = {} if _reader_of(path) == "text" else {"column": part.column}
        return {**about, "source": "files", "files": _contents(path), **column}
    return {**about, "config": part.config, "column": part.column, "split": part.split}


def has_conversations(corpus: Corpus | Mixture) -> bool:
    """Whether text is worded by the teacher's chat template: as the settings say, or the first rows of local files."""
    return any(part.is_chat or _starts_with_chat(part, str(_identity(part))) for part, _ in shares_of(corpus))


@cache
def _starts_with_chat(part: Corpus, identity: str) -> bool:
    """Whether local files that are what `identity` says begin with conversations."""
    if part.source == DEMO or not Path(part.source).exists() or _reader_of(Path(part.source)) in (None, "text"):
        return False
    try:
        rows = list(islice(part._open(), _FIRST_ROWS))
    except Exception:
        return False  # Whoever reads the text says why it cannot be read.
    return any(messages_in(row.get(name)) for row in rows for name in (part.column, *CHAT_COLUMNS))


def _contents(path: Path) -> list[tuple[str, int, str]]:
    """Name, size and digest of every file of a local source."""
    paths = _files(path)
    most = max(_LEAST_DIGESTED, _DIGESTED // max(1, len(paths)))
    found = []
    for file in paths:
        stat = file.stat()
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        found.append((name, stat.st_size, content_digest(file, stat.st_size, stat.st_mtime_ns, most)))
    return found


def no_text(corpus: Corpus, split: str) -> UserError:
    """What to say of a corpus without a document in `split`."""
    return UserError(f"{corpus.source} has no text for the split {split!r}: it needs more documents")


def _files(path: Path) -> list[Path]:
    """The readable files of a folder, or the file itself."""
    return sorted(file for file in path.rglob("*") if _reader(file)) if path.is_dir() else [path]


def _reader_of(path: Path) -> str | None:
    """The reader of a file, or of the first file in a folder."""
    paths = _files(path) if path.exists() else []
    return _reader(paths[0]) if paths else None


def _cut(text: str) -> Iterator[str]:
    """A long text in pieces of at least `_PIECE` characters, each ending with an empty line."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + _PIECE) if len(text) - start > _LONG else -1
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


def _reader(path: Path) -> str | None:
    """The `datasets` reader for a file name, compressed or not."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".xz", ".gz", ".zst")]
    return _READERS.get(suffixes[-1]) if suffixes and path.is_file() else None
