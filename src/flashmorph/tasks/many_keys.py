"""Key-value retrieval: find the value of one key among `num_keys`, or of several of them.

One key is the single needle (RULER's niah_single); ten keys, all asked, is the many-passkey setting of FlashMorph
(arXiv 2606.30562, section 3.4), there with words instead of numbers.
"""

import random

from flashmorph.errors import UserError
from flashmorph.tasks.problem import Problem, ask, random_value, two_word_keys
from flashmorph.tasks.style import Style


def many_keys(
    rng: random.Random, style: Style, names: tuple[str, ...], num_keys: int = 8, num_asked: int = 1
) -> Problem:
    """`num_keys` facts in random order, then questions for `num_asked` of them.

    Raises:
        UserError: `num_asked` is not between 1 and `num_keys`, or there are not that many keys.
    """
    if not 1 <= num_asked <= num_keys:
        raise UserError(f"num_asked must be between 1 and num_keys = {num_keys}; got {num_asked}")
    values = {key: random_value(rng, style) for key in two_word_keys(rng, names, num_keys)}
    facts = tuple(style.fact.format(key=key, value=value) for key, value in values.items())
    asked = rng.sample(list(values), num_asked)
    questions = tuple(ask(style, key, values[key]) for key in asked)
    return Problem(facts, questions, needle=list(values).index(asked[-1]))
