"""Variable tracking (RULER's vt): all names that a value is handed on to, after one solved example."""

import random
import string

from flashmorph.tasks.haystack import NOISE
from flashmorph.tasks.ruler.written import Material, Written

_ASK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
# The misspelling is RULER's: published figures were measured with it.
_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assgined the "
    "value {value}, they are:"
)
_EXAMPLE_UNITS = (6, 15)


def tracking(
    rng: random.Random, material: Material, units: int, depth: float | None, num_chains: int = 1, num_hops: int = 4
) -> Written:
    """`num_chains` chains of a value and `num_hops` further names in lines of repeated sentences.

    The solved example before it has about 500 tokens as in RULER, fewer in short contexts: a tenth of the lines.

    Args:
        rng: Draws names, values and lines.
        material: Unused: the haystack is RULER's repeated sentences.
        units: Lines of the haystack.
        depth: Unused: the statements are spread over the text.
        num_chains: Chains in the context; the first is asked for.
        num_hops: Names of a chain after its first.
    """
    least, most = _EXAMPLE_UNITS
    example = _chains(rng, min(most, max(least, units // 10)), num_chains, num_hops, 3)
    asked = _chains(rng, units, num_chains, num_hops, 5)
    solved = f"{example.prompt} {' '.join(example.references)}\n\n"
    return Written(solved + asked.question, asked.prefix, asked.references)


def _chains(rng: random.Random, units: int, num_chains: int, num_hops: int, letters: int) -> Written:
    names: dict[str, None] = {}
    while len(names) < num_chains * (num_hops + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    lines = [NOISE + "\n"] * units
    chains = [list(names)[start::num_chains] for start in range(num_chains)]
    values = [str(rng.randrange(10_000, 99_999)) for _ in chains]
    for chain, value in zip(chains, values, strict=True):
        statements = [f"VAR {chain[0]} = {value}"]
        statements += [f"VAR {name} = VAR {before} " for before, name in zip(chain, chain[1:], strict=False)]
        positions = sorted(rng.sample(range(len(lines)), len(statements)))
        for inserted, (position, statement) in enumerate(zip(positions, statements, strict=True)):
            lines.insert(position + inserted, statement)
    return Written(
        _ASK.format(context=" ".join(lines), value=values[0]),
        _PREFIX.format(number=num_hops + 1, value=values[0]),
        tuple(chains[0]),
    )
