"""What facts are hidden in: lines of real text, or one sentence over and over (RULER's NIAH-S1)."""

import random
from collections.abc import Iterator, Sequence

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


class Haystack:
    """Endless lines, each with its line end, from a pool of documents."""

    def __init__(self, documents: Sequence[str]):
        """`documents` must hold at least one character that is not white space."""
        self._documents = [lines for text in documents if text.strip() and (lines := text.splitlines(keepends=True))]
        if not self._documents:
            raise ValueError("a haystack needs at least one document that is not empty")

    @classmethod
    def repeated(cls) -> "Haystack":
        """The same sentences again and again."""
        return cls([REPEATED])

    def lines(self, rng: random.Random) -> Iterator[str]:
        """Lines from a random place on, then from another document, and so on."""
        while True:
            document = rng.choice(self._documents)
            for line in document[rng.randrange(len(document)) :]:
                yield line if line.endswith("\n") else line + "\n"
