"""Packed rows of tokens on disk: written from a corpus before a stage trains, then memory-mapped."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flashmorph.data.corpus import Corpus, Mixture, shares_of
from flashmorph.data.documents import FIRST, IGNORED, Part, TooLittle, marked
from flashmorph.errors import UserError
from flashmorph.files import is_whole_array, write_json, writing
from flashmorph.inputs.shapes import Count, Shape, has_broken_seal, read_as, sealed
from flashmorph.progress import Report, silent
from flashmorph.records import Figures
from flashmorph.tokens.special_tokens import before_text, room_for_text

PARTIAL = ".partial"
_ROWS, _POSITION = "rows.npy", "position.json"
_KEEP_TOKENS = 1 << 22
_LOG = logging.getLogger(__name__)


class Rows(Dataset[dict[str, list[int]]]):
    """Rows of token ids `[rows, length]`, memory-mapped from a file.

    The highest bit of an id marks the first token of a document; `starts` are the positions of those tokens in a row,
    always with position 0. The next bit marks a token that is no target of the loss; `ignored` are the positions of
    those. Each document begins with the special tokens that the tokenizer puts before a text, and so does the rest of a
    document at the start of a row. They are no targets, nor is the first token of such a rest, which has no context.
    """

    def __init__(self, path: Path):
        self._ids = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        stored = self._ids[row]
        positions = np.flatnonzero(stored[1:] & FIRST) + 1
        return {
            "input_ids": (stored & ~(FIRST | IGNORED)).tolist(),
            "starts": [0, *positions.tolist()],
            "ignored": np.flatnonzero(stored & IGNORED).tolist(),
        }

    def mean_context(self, apart: bool) -> float:
        """The mean number of earlier tokens that a token attends to; `apart`: documents are isolated."""
        length = self._ids.shape[1]
        if not apart:
            return (length - 1) / 2
        pairs, at_once = 0, max(1, _KEEP_TOKENS // length)
        for row in range(0, len(self), at_once):
            begins = self._ids[row : row + at_once] & FIRST != 0
            begins[:, 0] = True
            sizes = np.diff(np.flatnonzero(begins), append=begins.size)
            pairs += int((sizes * (sizes - 1) // 2).sum())
        return pairs / self._ids.size


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
    learn_ends: bool = True,
) -> Rows:
    """Tokenise documents of `split`, join them end to end and cut rows of `length` tokens into the file `path`.

    The file marks the first token of each document, so that training can isolate them (`isolation.py`), and the tokens
    of conversations that are no targets of the loss. A row without targets is skipped.

    All rows are on disk before training starts, so training can resume at any step without reading the text again. An
    existing file is reused, unless it is truncated: then it is written again.

    An unfinished file is in a folder of its own (`.partial`), with the position that packing has reached. If
    packing is killed, the next call continues there and writes the same file.

    Args:
        corpus: The text, or several with their shares.
        tokenizer: The teacher's.
        split: Documents of this split only.
        length: Tokens of a row.
        rows: Number of rows, `others` included.
        seed: Of the order of documents.
        path: The file of rows, uint32 `[rows, length]`.
        max_passes: How often the text may be read; None: as often as needed.
        report: Called with the rows written and all rows.
        others: Further rows of `length` token ids, placed among the rows of text at regular intervals.
        long_documents: Only use documents that fill a row on their own, each for as many rows as it fills.
        learn_ends: Whether the token that ends a text is a target.

    Raises:
        UserError: the text would be repeated more than `max_passes` times, cannot be read, has conversations but the
            tokenizer no chat template, has no conversation with a target or no document that is long enough, or `path`
            cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    if path.exists() and not is_whole_array(path, (rows, length), np.uint32):
        _LOG.warning("%s is damaged; making it again", path)
        path.unlink()
    if not path.exists():
        needed = (rows - len(others)) * length
        text = _Text(corpus, tokenizer, split, seed, max_passes, needed, length, long_documents, learn_ends)
        with writing(path, within=partial):
            try:
                partial.mkdir(parents=True, exist_ok=True)
                _write(partial, text, others, (rows, length), report)
                os.replace(partial / _ROWS, path)
            except BaseException as error:
                if isinstance(error, TooLittle) or not (partial / _POSITION).exists():
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        text.report_left_out()
    shutil.rmtree(partial, ignore_errors=True)
    return Rows(path)


def _write(partial: Path, text: "_Text", others: Sequence[list[int]], shape: tuple[int, int], report: Report) -> None:
    """Write rows of `shape` into `partial`, from the position stored there on."""
    rows, length = shape
    position = _stored_position(partial, shape, text)
    done = text.restore(position) if position else 0
    free, needed = shutil.disk_usage(partial).free, 4 * (rows - done) * length
    if needed > free:
        raise UserError(f"{partial.parent} has {free:,} bytes free and the rows of text need {needed:,}: free some")
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
                position = {"datasets": datasets.__version__, "rows": row + 1, **text.state()}
                write_json(partial / _POSITION, sealed(position))


class _Position(Shape):
    """The position that packing has reached; `parts` are for `Part.restore`."""

    datasets: str
    rows: Count
    left: list[Count]
    parts: list[Figures]


def _stored_position(partial: Path, shape: tuple[int, int], text: "_Text") -> dict[str, Any] | None:
    """The position that interrupted packing can continue from, if there is an undamaged one.

    Another version of `datasets` may read in another order: then packing starts over.
    """
    rows, length = shape
    try:
        position = read_as(partial / _POSITION, _Position)
        size = (partial / _ROWS).stat().st_size
    except (OSError, UserError):
        return None
    done = position["rows"]
    usable = not has_broken_seal(position) and done <= rows and size >= 4 * done * length
    same_reader = usable and position["datasets"] == datasets.__version__ and text.has_as_many_parts(position)
    return position if same_reader else None


class _Text:
    """Running text as rows of `length` tokens, of each corpus its share; its state can be stored and restored."""

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
        learn_ends: bool,
    ):
        """The arguments of `pack`; `needed` are the tokens of text in all rows."""
        before = before_text(tokenizer)
        room_for_text(length, before)
        whole_rows = length if long_documents else None
        self._parts = [
            Part(part, share, tokenizer, split, seed, max_passes, round(share * needed), whole_rows, learn_ends)
            for part, share in shares_of(corpus)
        ]
        self._length, self._left = length, np.empty(0, np.uint32)
        self._before = marked(before, None, before) if before else self._left

    def take(self) -> np.ndarray:
        """The next row with a target.

        Raises:
            UserError: a whole pass over the text has none, or see `pack`.
        """
        last_pass = self._passes() + 1
        while not _has_target(row := self._next()):
            if self._passes() > last_pass:
                raise self._no_target()
            for part in self._parts:
                part.needed += round(part.share * self._length)
        return row

    def _next(self) -> np.ndarray:
        """The next row; the next document is always of the corpus that lags most behind its share.

        The rest of a document is a text of its own: it too begins with the special tokens.
        """
        self._gather(1)
        is_rest = bool(len(self._before)) and not self._left[0] & FIRST
        room = self._length - (len(self._before) if is_rest else 0)
        self._gather(room)
        unread = self._unread(room)
        taken, self._left = self._left[:room], self._left[room + unread :]
        if not is_rest:
            return taken
        row = np.concatenate([self._before, taken])
        row[len(self._before)] |= IGNORED
        return row

    def _unread(self, room: int) -> int:
        """The number of special tokens to drop after this row: those of a document whose special tokens do not all fit
        at its end. The next row begins with them anyway."""
        size = len(self._before)
        for begin in range(max(0, room - size + 1), room):
            if self._left[begin] & FIRST:
                self._gather(begin + size)
                if (self._left[begin : begin + size] == self._before).all():
                    return begin + size - room
        return 0

    def _gather(self, number: int) -> None:
        """Read documents until at least `number` tokens are ready."""
        while len(self._left) < number:
            part = min(self._parts, key=lambda part: part.made / part.share)
            self._left = np.concatenate([self._left, part.next()])

    def _passes(self) -> int:
        """The number of complete passes over the text."""
        return min(part.passes for part in self._parts)

    def _no_target(self) -> UserError:
        sources = " and ".join(part.source for part in self._parts)
        return UserError(
            f"{sources}: no row of {self._length:,} tokens has one to learn: give longer rows or other text"
        )

    def state(self) -> dict[str, Any]:
        """The position in the text, as JSON values."""
        return {"left": self._left.tolist(), "parts": [part.state() for part in self._parts]}

    def has_as_many_parts(self, state: dict[str, Any]) -> bool:
        """Whether a state has as many corpora."""
        return len(state["parts"]) == len(self._parts)

    def restore(self, state: dict[str, Any]) -> int:
        """Continue from a state. Returns the number of rows written until then."""
        self._left = np.array(state["left"], np.uint32)
        for part, its_state in zip(self._parts, state["parts"], strict=True):
            part.restore(its_state)
        return state["rows"]

    def report_left_out(self) -> None:
        """Log the conversations that were left out."""
        for part in self._parts:
            part.report_left_out()


def _has_target(row: np.ndarray) -> bool:
    """Whether a row `[length]` has a target: the first token of a row or document has no context and is none."""
    return not (row & IGNORED).any() or not (row[1:] & (FIRST | IGNORED)).all()
