"""The lines of a haystack that a row takes, with their sizes in tokens."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError
from flashmorph.tasks.breaking import SHARE, broken
from flashmorph.tasks.encoded import encode, ends_of
from flashmorph.tasks.haystack import Haystack

_END = "\n"


class LineSizes:
    """Measures lines and breaks long ones, each once for all rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._end = len(encode(tokenizer, _END))
        self._sizes: dict[str, int] = {}
        self._ends: dict[str, np.ndarray] = {}

    def size(self, line: str) -> int:
        """The tokens that `line` adds to a text of lines; at least one where there is more than white space."""
        if line not in self._sizes:
            size = len(encode(self._tokenizer, _END + line)) - self._end
            self._sizes[line] = max(size, 1 if line.strip() else 0)
        return self._sizes[line]

    def break_up(self, line: str, most: int) -> list[str]:
        """`line` in lines of at most `most` tokens; as it is where it has no more."""
        if len(line.encode()) <= most or self.size(line) <= most:
            return [line]
        if line not in self._ends:
            self._ends[line] = ends_of(self._tokenizer, line)
        ends, room = self._ends[line], max(1, most - self._end)

        def furthest(begin: int) -> int:
            last = int(np.searchsorted(ends, begin, side="right")) + room - 1
            return int(ends[last]) if last < len(ends) else len(line)

        return broken(line, furthest)


class Hay:
    """The lines of one row, as many as it turns out to need."""

    def __init__(self, sizes: LineSizes, haystack: Haystack, rng: random.Random, length: int):
        most = max(1, length // SHARE)
        self._source = haystack.lines(rng, lambda line: sizes.break_up(line, most))
        self._sizes, self._drawn, self._total = sizes, [], 0

    def last(self, tokens: int) -> tuple[list[str], list[int]]:
        """The last of enough lines for `tokens` tokens, and their sizes, which sum up to that: what the first line has
        too much is not counted."""
        while self._total < tokens:
            line = next(self._source)
            self._drawn.append((line, size := self._sizes.size(line)))
            self._total += size
        surplus, first = self._total - tokens, 0
        while first < len(self._drawn) and surplus >= self._drawn[first][1]:
            surplus -= self._drawn[first][1]
            first += 1
        taken, sizes = [line for line, _ in self._drawn[first:]], [size for _, size in self._drawn[first:]]
        return taken, [sizes[0] - surplus, *sizes[1:]] if sizes else []


class Piece(NamedTuple):
    """A part of a row's text; what is `fixed` or an `answer` must not be cut."""

    text: str
    kind: Literal["fixed", "hay", "answer"]


def hide(lines: Sequence[str], sizes: Sequence[int], facts: Sequence[str], depths: Sequence[float]) -> list[Piece]:
    """Lines with each fact before the first one that begins at or after its depth; `depths` are sorted.

    Raises:
        UserError: there is not one depth for each fact.
    """
    if len(depths) != len(facts):
        raise UserError(f"depths must give one depth for each of the {len(facts)} facts; got {len(depths)}")
    starts = np.cumsum([0, *sizes])
    offsets = np.asarray(depths, dtype=float) * starts[-1]
    before = np.where(offsets < starts[-1], np.searchsorted(starts, offsets, side="left"), len(lines))
    pieces: list[Piece] = []
    done = 0
    for fact, line in zip(facts, before.tolist(), strict=True):
        pieces += [Piece("".join(lines[done:line]), "hay"), Piece(fact, "fixed")]
        done = line
    return [*pieces, Piece("".join(lines[done:]), "hay")]
