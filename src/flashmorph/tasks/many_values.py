"""Several values of one key, all to be named in the order of the text (RULER's niah_multivalue)."""

import random

from flashmorph.errors import UserError
from flashmorph.tasks.problem import Problem, random_value, two_word_keys
from flashmorph.tasks.style import Style


def many_values(
    rng: random.Random, style: Style, names: tuple[str, ...], num_values: int = 2, num_keys: int = 1
) -> Problem:
    """`num_keys` keys with `num_values` values each, in random order; the question is for all values of one key.

    Raises:
        UserError: a number is below 1, or there are not that many keys.
    """
    if num_values < 1 or num_keys < 1:
        raise UserError(f"num_values and num_keys must be at least 1; got {num_values} and {num_keys}")
    keys = two_word_keys(rng, names, num_keys)
    pairs = [(key, random_value(rng, style)) for key in keys for _ in range(num_values)]
    rng.shuffle(pairs)
    asked = rng.choice(keys)
    values = style.separator.join(style.answer.format(value=value) for key, value in pairs if key == asked)
    facts = tuple(style.fact.format(key=key, value=value) for key, value in pairs)
    return Problem(facts, ((style.many_question.format(key=asked), values),))
