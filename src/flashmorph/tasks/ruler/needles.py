"""Needles in a haystack: RULER's eight niah tasks are one task with different numbers."""

import random
from bisect import bisect_right
from itertools import accumulate

from flashmorph.tasks.haystack import NOISE
from flashmorph.tasks.ruler.written import Material, Written

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ASK = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat {are_all} the special magic {kind} for {query} mentioned in the "
    "provided text?"
)
_PREFIX = "The special magic {kind} for {query} mentioned in the provided text {are}"
_DEPTHS = [round(step * 100 / 39) / 100 for step in range(40)]


def needles(
    rng: random.Random,
    material: Material,
    units: int,
    depth: float | None,
    haystack: str,
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
    key_kind: str = "words",
    value_kind: str = "numbers",
) -> Written:
    """`num_keys` keys with `num_values` values each; the question is for all values of `num_queries` keys.

    Args:
        rng: Draws keys, values and depths.
        material: Words, values and running text.
        units: Sentences of the haystack; of `text`, words.
        depth: Of the needles that are asked for, 0 the start and 1 the end; all others are at random depths. None: all
            are.
        haystack: `repeat` (the same five sentences), `needle` (other needles) or `text`.
        num_keys: Keys in the context.
        num_values: Values of each key.
        num_queries: Keys that are asked for.
        key_kind: `words`, `numbers` or `uuids`.
        value_kind: The same of values.
    """
    keys = [material.draw(rng, key_kind) for _ in range(num_keys)]
    facts = {key: [material.draw(rng, value_kind) for _ in range(num_values)] for key in keys}
    asked = rng.sample(list(facts), num_queries)
    pairs = [(key, value) for key, values in facts.items() for value in values]
    rng.shuffle(pairs)
    depths = rng.sample(_DEPTHS, len(pairs))
    if depth is not None:
        depths = [depth if key in asked else drawn for drawn, (key, _) in zip(depths, pairs, strict=True)]
    context = _hide(rng, material, units, haystack, sorted(zip(depths, pairs, strict=True)), (key_kind, value_kind))
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    one = num_queries * num_values == 1
    kind = value_kind.removesuffix("s") if one else value_kind
    words = {"some": "A", "are": "is", "are_all": "is"} if one else {"some": "Some", "are": "are", "are_all": "are all"}
    return Written(
        _ASK.format(kind=kind, context=context, query=query, **words),
        _PREFIX.format(kind=kind, query=query, are=words["are"]),
        tuple(value for key in asked for value in facts[key]),
    )


def _hide(
    rng: random.Random,
    material: Material,
    units: int,
    haystack: str,
    needles: list[tuple[float, tuple[str, str]]],
    kinds: tuple[str, str],
) -> str:
    """The haystack with each needle before the sentence at its depth.

    Args:
        rng: Draws the haystack.
        material: Words, values and running text.
        units: Sentences of the haystack; of `text`, words.
        haystack: See `needles`.
        needles: (depth, (key, value)) of each needle, sorted by depth.
        kinds: Of keys and of values.
    """
    key_kind, value_kind = kinds
    if haystack == "text":
        hay, joint = material.sentences(rng, units), " "
    elif haystack == "repeat":
        hay, joint = [NOISE] * units, "\n"
    else:
        pairs = [(material.draw(rng, key_kind), material.draw(rng, value_kind)) for _ in range(units)]
        hay, joint = [_NEEDLE.format(kind=value_kind, key=key, value=value) for key, value in pairs], "\n"
    ends = list(accumulate(map(len, hay)))
    for depth, (key, value) in reversed(needles):
        hay.insert(bisect_right(ends, depth * ends[-1]), _NEEDLE.format(kind=value_kind, key=key, value=value))
    return joint.join(hay)
