"""A question of RULER as text, and the material that its tasks draw from."""

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from wonderwords import RandomWord

from flashmorph.tasks.breaking import SHARE, broken

_LONGEST_WORD = 40


@cache
def _words(*categories: str) -> list[str]:
    return sorted(set(RandomWord().filter(include_categories=list(categories))))


@dataclass(frozen=True)
class Written:
    """The text up to the question, the beginning of the answer, and what the answer must hold."""

    question: str
    prefix: str
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The prompt of a base model."""
        return f"{self.question} {self.prefix}"


class Material:
    """Words, random values, and running text in place of RULER's essays, white space folded as there."""

    def __init__(self, documents: Sequence[str]):
        """`documents` must hold at least one word."""
        # In a script without spaces a text would be one word.
        self._essay = re.findall(rf"\S{{1,{_LONGEST_WORD}}} ?", " ".join(" ".join(documents).split()) + " ")
        if not self._essay:
            raise ValueError("RULER's haystack needs at least one document that is not empty")

    @property
    def words(self) -> list[str]:
        """Single words, for lists of words."""
        return _words("noun", "adjective", "verb")

    def draw(self, rng: random.Random, kind: str) -> str:
        """A random key or value: `words` (an adjective and a noun), `numbers` (seven digits) or `uuids`."""
        makers: dict[str, Callable[[], str]] = {
            "words": lambda: f"{rng.choice(_words('adjective'))}-{rng.choice(_words('noun'))}",
            "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
            "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        }
        return makers[kind]()

    def sentences(self, rng: random.Random, words: int) -> list[str]:
        """`words` words of running text from a random position on, in sentences; those that are long are broken."""
        start = rng.randrange(len(self._essay))
        text = "".join(self._essay[(start + word) % len(self._essay)] for word in range(words)).rstrip()
        most = max(1, len(text) // SHARE)
        return [
            part for sentence in re.split(r"(?<=[.!?]) ", text) for part in broken(sentence, lambda begin: begin + most)
        ]
