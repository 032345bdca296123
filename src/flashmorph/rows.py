"""Rows of tokens on disk: packed from a corpus before a stage trains, and read as they are needed."""

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
from flashmorph.wholeness import is_whole_array

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
    first among them. The next bit marks a token that is read but not learnt; `ignored` are the places of those.
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
) -> Rows:
    """Tokenise documents of `split`, join them end to end and cut rows of `length` tokens into the file `path`.

    Where documents begin is kept, so that training can hold them apart (`packing.py`), and which tokens of
    conversations are learnt. `others` are rows of that length that stand among those of text at regular intervals, made
    when it is their turn. The rows are on disk before training starts: any step can be resumed at without reading the
    text again. An existing file is taken as it is, unless it was cut: then it is made again.

    Until it is whole, the file stands in a folder of its own (`.partial`) beside the place in the text that it has come
    to. Packing that was killed goes on from there, and ends with the same file.

    Raises:
        UserError: the text would have to be repeated more than `max_passes` times (None: as often as it takes), cannot
            be read, has conversations that the tokenizer has no template for, or the place cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    if path.exists() and not is_whole_array(path):
        _LOG.warning("%s is damaged; making it again", path)
        path.unlink()
    if not path.exists():
        text = _Text(corpus, tokenizer, split, seed, max_passes, (rows - len(others)) * length)
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
            ids = others[number] if others_before[row + 1] > number else text.take(length)
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
    """Running text as tokens, of each corpus its share; it knows where it stands."""

    def __init__(
        self,
        corpus: Corpus | Mixture,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        seed: int,
        max_passes: int | None,
        needed: int,
    ):
        self._parts = [
            _Part(part, share, tokenizer, split, seed, max_passes, needed) for part, share in shares_of(corpus)
        ]
        self._left = np.empty(0, np.uint32)

    def take(self, length: int) -> np.ndarray:
        """The next `length` tokens; the next document is always of the corpus that lags most behind its share."""
        while len(self._left) < length:
            part = min(self._parts, key=lambda part: part.made / part.share)
            self._left = np.concatenate([self._left, part.next()])
        taken, self._left = self._left[:length], self._left[length:]
        return taken

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


class _Part:
    """One corpus, pass after pass: `made` tokens so far. The end-of-text token stands after each text."""

    def __init__(
        self,
        corpus: Corpus,
        share: float,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        seed: int,
        max_passes: int | None,
        needed: int,
    ):
        self.share, self.made = share, 0
        self._corpus, self._tokenizer, self._split, self._seed = corpus, tokenizer, split, seed
        self._max_passes, self._needed = max_passes, round(share * needed)
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._passes, self._made_before, self._unfit, self._reason = 0, 0, 0, ""
        self._place = Place()
        self._documents: Iterator[tuple[np.ndarray, Place]] | None = None

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
                raise self._no_text()
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
            raise _TooLittle(
                f"{self._corpus.source} is too small: it has about {self.made // self._passes:,} tokens for the split "
                f"{self._split!r} and {self._needed:,} are needed, more than {self._max_passes} times that; give more "
                "--data, fewer tokens, or --allow-repeat"
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
                    ids, learnt = [*next(of_texts), *self._end], None
                else:
                    ids, learnt = self._encode_chat(document)
                if ids:
                    yield _marked(ids, learnt), place

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


def _marked(ids: list[int], learnt: list[bool] | None) -> np.ndarray:
    tokens = np.array(ids, np.uint32)
    tokens[0] |= _FIRST
    if learnt is not None:
        tokens[~np.array(learnt)] |= _IGNORED
    return tokens
