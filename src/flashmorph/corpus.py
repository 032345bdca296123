"""Text: where it comes from, its four disjoint splits, and rows of tokens packed from it."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError
from flashmorph.files import atomic_path
from flashmorph.progress import Report, silent
from flashmorph.tasks.words import SPLITS

DEMO = "demo"
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_HELD_OUT_SHARES = {"validation": 0.05, "referee": 0.05, "test": 0.05}
_SHUFFLE_BUFFER = 1_000
_POOL_CHARACTERS = 8_000_000
_LONG, _PIECE = 60_000, 20_000
_FIRST = np.uint32(1 << 31)


def split_of(text: str) -> str:
    """The split that a document belongs to, from the digest of its text alone: no order or seed can move it."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    for split, share in _HELD_OUT_SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


@dataclass(frozen=True)
class Corpus:
    """Documents from the shipped demo text, local files or a dataset of the Hugging Face hub.

    `source` is `demo`, a file, a folder of files (txt, md, jsonl, json, parquet, each also compressed as xz, gz or
    zst) or the name of a dataset, which is streamed; `config` and `column` belong to the latter two. A txt or md file
    is one document, unless it is long: then it is cut at empty lines, so that one big file has all splits too.
    """

    source: str = DEMO
    config: str | None = None
    column: str = "text"

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """One pass over the documents of `split`, shuffled by `seed`.

        Raises:
            ValueError: `split` is unknown.
            UserError: nothing readable at `source`, or it has no column of that name.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        whole_files = self.source != DEMO and _reader_of(Path(self.source)) == "text"
        for row in self._rows(seed):
            if self.column not in row:
                raise UserError(f"{self.source} has no column {self.column!r}; it has {', '.join(map(repr, row))}")
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise UserError(f"{self.source}: column {self.column!r} holds {text!r}, which is no text")
            for document in _cut(text or "") if whole_files else [text]:
                if document and split_of(document) == split:
                    yield document

    def _rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """The rows of one pass; whatever a reader stumbles over becomes one sentence."""
        try:
            yield from self._open().shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        except UserError:
            raise
        except StopIteration as error:
            raise UserError(f"{self.source} is empty") from error
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.source} cannot be read: {reason}") from error

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
            raise UserError(f"{self.source} has no text for the split {split!r}: it needs more documents")
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
            return datasets.load_dataset(self.source, self.config, split="train", streaming=True)
        except Exception as error:
            raise UserError(
                f"no text at {self.source!r}: it is no local file or folder, and the hub says: "
                f"{str(error).splitlines()[0]}"
            ) from error


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


class Rows(Dataset[dict[str, list[int]]]):
    """Rows of token ids `[rows, length]`, mapped from a file and read as they are needed.

    The highest bit of an id marks the first token of a document; `starts` are the places of those tokens in a row, its
    first among them.
    """

    def __init__(self, path: Path):
        self._ids = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        stored = self._ids[row]
        places = np.flatnonzero(stored[1:] & _FIRST) + 1
        return {"input_ids": (stored & ~_FIRST).tolist(), "starts": [0, *places.tolist()]}


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    length: int,
    rows: int,
    seed: int,
    path: Path,
    max_passes: int | None = 4,
    report: Report = silent,
    others: Sequence[list[int]] = (),
) -> Rows:
    """Tokenise documents of `split`, join them end to end and cut rows of `length` tokens into the file `path`.

    Where documents begin is kept, so that training can hold them apart (`packing.py`).
    `others` are rows of that length that stand among those of text at regular intervals. The rows are on disk before
    training starts: any step can be resumed at without reading the text again. An existing file is taken as it is.

    Raises:
        UserError: the text would have to be repeated more than `max_passes` times (None: as often as it takes).
    """
    if not path.exists():
        with atomic_path(path) as temporary:
            ids = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint32, shape=(rows, length))
            is_other = np.diff(np.arange(rows + 1) * len(others) // rows) > 0
            for row, other in zip(np.flatnonzero(is_other), others, strict=True):
                ids[row] = other
            text = _text_tokens(corpus, tokenizer, split, (rows - len(others)) * length, seed, max_passes, report)
            for row in np.flatnonzero(~is_other):
                ids[row] = list(islice(text, length))
            ids.flush()
            del ids
    return Rows(path)


def _text_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    needed: int,
    seed: int,
    max_passes: int | None,
    report: Report,
) -> Iterator[int]:
    """`needed` tokens of running text, the text repeated where it must be.

    The end-of-text token stands after each document; its first token is marked.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    made, passes = 0, 0
    while made < needed:
        if max_passes is not None and passes == max_passes:
            raise UserError(
                f"{corpus.source} is too small: it has about {made // passes:,} tokens for the split {split!r} and "
                f"{needed:,} are needed, more than {max_passes} times that; give more --data, fewer tokens, or "
                "--allow-repeat"
            )
        before = made
        for text in corpus.documents(split, seed + passes):
            tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids + separator
            yield from (token | int(_FIRST) if place == 0 else token for place, token in enumerate(tokens))
            made += len(tokens)
            report(min(made, needed), needed)
            if made >= needed:
                break
        if made == before:
            raise UserError(f"{corpus.source} has no text for the split {split!r}: it needs more documents")
        passes += 1
