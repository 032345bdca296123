"""`Problem`, the output of a task: facts to hide in a text and questions to ask at its end."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from flashmorph.errors import UserError
from flashmorph.tasks.style import Style


@dataclass(frozen=True)
class Problem:
    """`facts` keep their order in the text; `questions` are (prompt, answer) pairs, asked one after the other.

    `needle` is the index in `facts` of the one that the last question is about, where it is about one and the order of
    the facts is of no account.
    """

    facts: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    needle: int | None = None


Task = Callable[..., Problem]
"""`task(rng, style, names, **settings) -> Problem`; `names` are the words of one split (see `words.names`)."""


def two_word_keys(rng: random.Random, names: tuple[str, ...], number: int) -> list[str]:
    """`number` distinct keys of two different words each.

    Raises:
        UserError: the split has fewer such pairs than asked for.
    """
    available = len(names) * (len(names) - 1)
    if number > available:
        raise UserError(f"num_keys must be at most {available}, the number of keys in one split; got {number}")
    keys: dict[str, None] = {}
    while len(keys) < number:
        keys[" ".join(rng.sample(names, 2))] = None
    return list(keys)


def one_word_keys(rng: random.Random, names: tuple[str, ...], number: int) -> list[str]:
    """`number` distinct keys of one word each.

    Raises:
        UserError: the split has fewer words than asked for.
    """
    if number > len(names):
        raise UserError(f"this task needs {number} one-word keys and a split has {len(names)}; ask for fewer chains")
    return rng.sample(names, number)


def random_value(rng: random.Random, style: Style) -> str:
    """A number of `style.value_digits` digits that does not start with 0."""
    return str(rng.randrange(10 ** (style.value_digits - 1), 10**style.value_digits))


def ask(style: Style, key: str, value: str) -> tuple[str, str]:
    """The question for one value of `key` and its answer."""
    return style.question.format(key=key), style.answer.format(value=value)
