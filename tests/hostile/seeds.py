"""Which cases are run: how many and from which seed, in `make test` and by whoever asks for others."""

import os
import random
from collections.abc import Callable, Iterator, Sequence

from hostile.harness import Case

Maker = Callable[[random.Random], Case]


def seed() -> int:
    """The seed of the cases; the variable HOSTILE_SEED gives another."""
    return int(os.environ.get("HOSTILE_SEED", "0"))


def number(usual: int) -> int:
    """How many cases a generator makes; the variable HOSTILE_CASES gives another number."""
    return int(os.environ.get("HOSTILE_CASES", usual))


def in_turn(kind: str, makers: Sequence[Maker], seed: int, number: int) -> Iterator[Case]:
    """`number` cases, from each maker in turn, so that few cases are of every kind already.

    Each case has a random generator of its own: its number and the seed say which it is.
    """
    for each in range(number):
        yield makers[each % len(makers)](random.Random(f"{kind} {seed} {each}"))
