"""Variable tracking: a chain of links that ends at a value (RULER's vt, with one value asked for).

The text has several chains: with a single one, copying its only value would look like following the chain.
"""

import random

from flashmorph.errors import UserError
from flashmorph.tasks.problem import Problem, ask, one_word_keys, random_value
from flashmorph.tasks.style import Style


def hops(
    rng: random.Random, style: Style, names: tuple[str, ...], num_chains: int = 4, num_hops: int = 2, num_asked: int = 1
) -> Problem:
    """`num_chains` chains of `num_hops` statements each (a root with a value, then links), interleaved at random.

    A link comes after its target. The questions are for the last names of chains.

    Args:
        rng: Draws names, values and the order of statements.
        style: The wording of facts and questions.
        names: The names of the split.
        num_chains: Chains in the context.
        num_hops: Statements of a chain, at least 2.
        num_asked: Chains that are asked for.

    Raises:
        UserError: a number is out of range, or a split has too few names.
    """
    if num_hops < 2 or not 1 <= num_asked <= num_chains:
        raise UserError(
            f"num_hops must be at least 2 and num_asked between 1 and num_chains = {num_chains}; "
            f"got {num_hops} and {num_asked}"
        )
    keys = one_word_keys(rng, names, num_chains * num_hops)
    chains = [keys[start : start + num_hops] for start in range(0, len(keys), num_hops)]
    values = [random_value(rng, style) for _ in chains]
    turns = [chain for chain in range(num_chains) for _ in range(num_hops)]
    rng.shuffle(turns)
    depth = [0] * num_chains
    facts = []
    for chain in turns:
        position = depth[chain]
        key = chains[chain][position]
        if position == 0:
            facts.append(style.fact.format(key=key, value=values[chain]))
        else:
            facts.append(style.link.format(key=key, target=chains[chain][position - 1]))
        depth[chain] += 1
    asked = rng.sample(range(num_chains), num_asked)
    return Problem(tuple(facts), tuple(ask(style, chains[chain][-1], values[chain]) for chain in asked))
