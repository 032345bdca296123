"""Text: its sources, its four disjoint splits, and the position of a reader."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

from flashmorph.data.chat import CHAT_COLUMNS
from flashmorph.data.folders import data_files, nothing_to_read, unread
from flashmorph.data.formats import BESIDE, HELD_OUT_SHARES, Document, document_of, text_columns
from flashmorph.data.pieces import LONG, PIECE
from flashmorph.data.textfiles import kind_of, stream_of
from flashmorph.errors import UserError, first_line
from flashmorph.files import names_a_path
from flashmorph.tasks.words import SPLITS

DEMO = "demo"
_CHAT = ("messages", "conversations")
"""Columns of conversations by name alone. That enters digests, so columns that came later are not among them."""
_PURPOSES = {
    "train": "training",
    "validation": "the search",
    "referee": "comparing strategies",
    "test": "evaluation",
}
_ENOUGH = 100
"""Documents of which a split of 5 % has at least one in 199 of 200 cases."""
_BLOCK = 1_000
_POOL_CHARACTERS = 8_000_000


@dataclass(frozen=True)
class Position:
    """The position of a pass over a corpus, as JSON values.

    `reader` is the state of the stream before a block of rows, `blocks` the number of blocks before it, `given` the
    number of documents already read from the block.
    """

    reader: dict[str, Any] | None = None
    blocks: int = 0
    given: int = 0


class Pooled(Protocol):
    """Text that questions can be laid out in: a corpus, a mixture, or what a run keeps of either (`run/pools.py`)."""

    def pool(self, split: str, seed: int) -> list[str]:
        """Documents of `split`; see `Corpus.pool`."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Documents from the shipped demo text, local files or a dataset of the Hugging Face hub.

    `source` is `demo`, a file, a folder of files (txt, md, jsonl, json, parquet, csv, tsv, each also compressed as xz,
    gz or zst) or the name of a dataset, which is streamed; `config` and `column` belong to the latter two, `split` to a
    dataset. A txt or md file is one document, unless it is long: then it is cut, so that one big file has all splits
    too (`textfiles.py`). `formats.py` has the columns that a row may have in place of `column`. `replies_only`: in
    conversations only the assistant's words are targets of the loss, and of a prompt and its completion the latter.
    """

    source: str = DEMO
    config: str | None = None
    column: str = "text"
    split: str = "train"
    replies_only: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether its settings allow for conversations and no plain text; a prompt and its completion may be text."""
        return self.replies_only or self.column in _CHAT

    @property
    def names_chat(self) -> bool:
        """Whether its settings name a column of conversations."""
        return self.column in CHAT_COLUMNS

    def documents(self, split: str, seed: int) -> Iterator[str]:
        """The text of one pass over the documents of `split`; see `read`."""
        return (document.text for document, _ in self.read(split, seed) if document.text)

    def read(self, split: str, seed: int, position: Position | None = None) -> Iterator[tuple[Document, Position]]:
        """One pass over the documents of `split`, from `position` on, each with the position after it.

        The files of a source are read in turns, in an order that `seed` shuffles, and each `_BLOCK` rows are shuffled
        among themselves. So a position needs no more than the stream's own state: `datasets` would shuffle through a
        buffer whose content is lost when a stream is restored.

        Raises:
            ValueError: `split` is unknown.
            UserError: nothing readable at `source`, or it has no column of that name.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        for block, start in self._blocks(seed, position or Position()):
            documents = (document_of(row, self.column, where) for where, row in block)
            of_split = (document for document in documents if document and document.split == split)
            for number, document in enumerate(islice(of_split, start.given, None), start.given + 1):
                yield document, Position(start.reader, start.blocks, number)
            block.clear()  # Of long documents two blocks at once may be more than there is memory.

    def every(self) -> Iterator[Document]:
        """One pass over the documents of all splits; see `read`."""
        for block, _ in self._blocks(0, Position()):
            yield from (document for where, row in block if (document := document_of(row, self.column, where)))
            block.clear()

    def _blocks(self, seed: int, position: Position) -> Iterator[tuple[list[tuple[str, dict[str, Any]]], Position]]:
        """Shuffled blocks of rows, each row with its file or dataset, each block with its position.

        Raises:
            UserError: any error of the reader, in one sentence.
        """
        order = np.random.default_rng(seed)
        for _ in range(position.blocks):
            order.permutation(_BLOCK)
        try:
            paths = self.paths()
            stream = self._from_hub() if paths is None else stream_of(paths, text_columns(self.column), BESIDE)
            stream = stream.shuffle(seed=seed, buffer_size=1)
            if position.reader:
                stream.load_state_dict(position.reader)
            rows = ((self.source, row) if paths is None else (row["file"], row["row"]) for row in stream)
            while block := list(islice(rows, _BLOCK)):
                block = [block[number] for number in order.permutation(len(block))]
                yield block, position
                position = Position(stream.state_dict(), position.blocks + 1)
        except UserError:
            raise
        except StopIteration as error:
            raise UserError(f"{self.source} is empty") from error
        except Exception as error:
            raise UserError(f"{self.source} cannot be read: {first_line(error)}") from error

    def pool(self, split: str, seed: int, characters: int = _POOL_CHARACTERS) -> list[str]:
        """Documents of `split` up to about `characters` characters, for haystacks.

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

    def paths(self) -> list[Path] | None:
        """The local files that are read; None for a dataset of the hub.

        Raises:
            UserError: see `data_files`; or nothing of text at `source`; or nothing, and no dataset is called so.
        """
        if self.source == DEMO:
            return [Path(str(files("flashmorph") / "assets" / "demo_text.jsonl.xz"))]
        path = Path(self.source)
        if not path.exists():
            if names_a_path(self.source) or kind_of(path):
                raise UserError(f"there is no file or folder {self.source!r}: give text, or a dataset of the hub")
            return None
        if not (paths := data_files(path, text_columns(self.column))):
            raise nothing_to_read(path)
        return paths

    def _from_hub(self) -> datasets.IterableDataset:
        try:
            return datasets.load_dataset(self.source, self.config, split=self.split, streaming=True)
        except Exception as error:
            raise UserError(
                f"no text at {self.source!r}: it is no local file or folder (give one with --data), and of the dataset "
                f"the hub says: {first_line(error)}"
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


def files_of(corpus: Corpus | Mixture) -> list[Path]:
    """The user's own files that a corpus is read from; none for the demo text or the hub."""
    parts = [part for part, _ in shares_of(corpus) if part.source != DEMO]
    return [file for part in parts for file in part.paths() or []]


def unread_of(corpus: Corpus | Mixture) -> list[str]:
    """A line on each local folder with files that are not read.

    Raises:
        UserError: see `Corpus.paths`.
    """
    parts = [part for part, _ in shares_of(corpus) if part.source != DEMO]
    return [line for part in parts if (paths := part.paths()) and (line := unread(Path(part.source), paths))]


def no_text(corpus: Corpus, *splits: str) -> UserError:
    """The error for a corpus without a document in these splits; of local text it has the number of documents."""
    missing = " and ".join(f"{split!r} ({_PURPOSES[split]})" for split in splits)
    missing = f"the split{'s' * (len(splits) > 1)} {missing}"
    there, is_local = "", corpus.paths() is not None
    if is_local:
        counts = Counter(document.split for document in corpus.every())
        if not (number := counts.total()):
            return UserError(f"{corpus.source} has no text for {missing}: all of its files or rows are empty")
        of_each = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
        there = f"it has {number:,} document{'s' * (number > 1)} ({of_each}), and "
    share = f"{min(HELD_OUT_SHARES.values()):.0%} each go to {', '.join(HELD_OUT_SHARES)}, by their content"
    return UserError(
        f"{corpus.source} has no text for {missing}: {there}of all documents {share}; give {_ENOUGH} different ones or "
        f"more, or cut yours up (a document is a file, a row, or some {PIECE:,} characters of a text of more than "
        f"{LONG:,})"
    )
