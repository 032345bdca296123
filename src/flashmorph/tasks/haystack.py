"""Haystacks: lines of real text, or one repeated sentence (RULER's NIAH-S1)."""

import random
from collections.abc import Callable, Iterator, Sequence

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's sentence (arXiv 2404.06654)."""
REPEATED = f"{NOISE}\n"


def _as_it_is(line: str) -> list[str]:
    return [line]


class Haystack:
    """Endless lines, each with its line end, from a pool of documents."""

    def __init__(self, documents: Sequence[str], whole_lines: bool = False):
        """`documents` must hold at least one character that is not white space; `whole_lines` are never broken."""
        self._whole_lines = whole_lines
        self._documents = [lines for text in documents if text.strip() and (lines := text.splitlines(keepends=True))]
        if not self._documents:
            raise ValueError("a haystack needs at least one document that is not empty")

    @classmethod
    def repeated(cls) -> "Haystack":
        """The same line again and again."""
        return cls([REPEATED], whole_lines=True)

    def lines(self, rng: random.Random, break_up: Callable[[str], list[str]] = _as_it_is) -> Iterator[str]:
        """Lines from a random position on, then from another document, and so on; `break_up` splits a long line.

        Where the first line is broken, the position is in one of its parts.
        """
        break_up = _as_it_is if self._whole_lines else break_up
        while True:
            document = rng.choice(self._documents)
            first = rng.randrange(len(document))
            for number, line in enumerate(document[first:]):
                parts = break_up(line)
                begin = rng.randrange(len(parts)) if number == 0 and len(parts) > 1 else 0
                for part in parts[begin:]:
                    yield part if part.endswith("\n") else part + "\n"
