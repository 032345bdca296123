"""Rows of tokens on disk: packed from a corpus before a stage trains, and read as they are needed."""

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
from flashmorph.files import is_whole_array, write_json
from flashmorph.inputs.shapes import Count, Shape, has_broken_seal, read_as, sealed
from flashmorph.progress import Report, silent
from flashmorph.tokens.special_tokens import before_text, room_for_text

PARTIAL = ".partial"
_ROWS, _POSITION = "rows.npy", "position.json"
_KEEP_TOKENS = 1 << 22
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
        places = np.flatnonzero(stored[1:] & FIRST) + 1
        return {
            "input_ids": (stored & ~(FIRST | IGNORED)).tolist(),
            "starts": [0, *places.tolist()],
            "ignored": np.flatnonzero(stored & IGNORED).tolist(),
        }

    def mean_context(self, apart: bool) -> float:
        """The tokens before a token that it can attend to, on average; `apart`: documents do not see each other."""
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
) -> Rows:
    """Tokenise documents of `split`, join them end to end and cut rows of `length` tokens into the file `path`.

    Where documents begin is kept, so that training can hold them apart (`isolation.py`), and which tokens of
    conversations are learnt; a row in which nothing is learnt gives way to the next one. With `long_documents` only
    those are taken that fill a row on their own, each as many whole rows as it fills. `others` are rows of that length
    that stand among those of text at regular intervals, made when it is their turn.

    The rows are on disk before training starts: any step can be resumed at without reading the text again. An existing
    file is taken as it is, unless it was cut: then it is made again.

    Until it is whole, the file stands in a folder of its own (`.partial`) beside the place in the text that it has come
    to. Packing that was killed goes on from there, and ends with the same file.

    Raises:
        UserError: the text would have to be repeated more than `max_passes` times (None: as often as it takes), cannot
            be read, has conversations that the tokenizer has no template for or none with a token to learn, or no
            document that is long enough, or the place cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    if path.exists() and not is_whole_array(path, (rows, length), np.uint32):
        _LOG.warning("%s is damaged; making it again", path)
        path.unlink()
    if not path.exists():
        needed = (rows - len(others)) * length
        text = _Text(corpus, tokenizer, split, seed, max_passes, needed, length, long_documents)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _write(partial, text, others, (rows, length), report)
            os.replace(partial / _ROWS, path)
        except BaseException as error:
            if isinstance(error, TooLittle) or not (partial / _POSITION).exists():
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
    kept = _kept(partial, shape, text)
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
                position = {"datasets": datasets.__version__, "rows": row + 1, **text.state()}
                write_json(partial / _POSITION, sealed(position))


class _Position(Shape):
    """Where packing has come to; the parts are for `Part.restore`."""

    datasets: str
    rows: Count
    left: list[Count]
    parts: list[dict[str, Any]]


def _kept(partial: Path, shape: tuple[int, int], text: "_Text") -> dict[str, Any] | None:
    """The position that interrupted packing can go on from, if there is one that is whole.

    Another version of `datasets` may read in another order: then packing begins again.
    """
    rows, length = shape
    try:
        kept = read_as(partial / _POSITION, _Position)
        size = (partial / _ROWS).stat().st_size
    except (OSError, UserError):
        return None
    whole = not has_broken_seal(kept) and kept["rows"] <= rows and size >= 4 * kept["rows"] * length
    return kept if whole and kept["datasets"] == datasets.__version__ and text.has_as_many_parts(kept) else None


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
        self._before = marked(before, None, before) if before else self._left

    def take(self) -> np.ndarray:
        """The next row in which something is learnt.

        Raises:
            UserError: there is none in a whole pass over the text, or see `pack`.
        """
        last_pass = self._passes() + 1
        while not _teaches(row := self._next()):
            if self._passes() > last_pass:
                raise self._nothing_learnt()
            for part in self._parts:
                part.needed += round(part.share * self._length)
        return row

    def _next(self) -> np.ndarray:
        """The next row; the next document is always of the corpus that lags most behind its share.

        The rest of a document is read as a text of its own: it begins with the special tokens too.
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
        """Of a document whose special tokens do not all fit at the end of a row: those that the next row begins with
        anyway."""
        size = len(self._before)
        for begin in range(max(0, room - size + 1), room):
            if self._left[begin] & FIRST:
                self._gather(begin + size)
                if (self._left[begin : begin + size] == self._before).all():
                    return begin + size - room
        return 0

    def _gather(self, number: int) -> None:
        """Have at least so many tokens ready."""
        while len(self._left) < number:
            part = min(self._parts, key=lambda part: part.made / part.share)
            self._left = np.concatenate([self._left, part.next()])

    def _passes(self) -> int:
        """How often all of the text was read."""
        return min(part.passes for part in self._parts)

    def _nothing_learnt(self) -> UserError:
        sources = " and ".join(part.source for part in self._parts)
        return UserError(
            f"{sources}: no row of {self._length:,} tokens has one to learn: give longer rows or other text"
        )

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        return {"left": self._left.tolist(), "parts": [part.state() for part in self._parts]}

    def has_as_many_parts(self, kept: dict[str, Any]) -> bool:
        """Whether a state is of as many corpora."""
        return len(kept["parts"]) == len(self._parts)

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


def _teaches(row: np.ndarray) -> bool:
    """Whether a token of the row is learnt: not the first of the row or of a document, which nothing predicts."""
    return not (row & IGNORED).any() or not (row[1:] & (FIRST | IGNORED)).all()
