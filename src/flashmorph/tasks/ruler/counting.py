"""Counting words: RULER's common words (cwe, words of two frequencies) and frequent words (fwe, Zipf's law)."""

import random
import string

from scipy.special import zeta

from flashmorph.tasks.ruler.written import Material, Written

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_MANY, _ASKED = 10, 3
_ALPHA = 2.0


def common_words(rng: random.Random, material: Material, units: int, depth: float | None, long: bool) -> Written:
    """`units` different words, ten of them more often, after a solved example.

    Ten words come 30 times and the others 3 times; in contexts that are not `long` (below 4,096 tokens) 6 times and
    once.
    """
    shots, repeats = ((40, (10, 3)), (30, 3)) if long else ((20, (3, 1)), (6, 1))
    example = _list(rng, material, shots[0], *shots[1])
    asked = _list(rng, material, units, *repeats)
    solved = f"{example.prompt} {_numbered(example.references)}\n"
    return Written(solved + asked.question, asked.prefix, asked.references)


def _list(rng: random.Random, material: Material, different: int, often: int, seldom: int) -> Written:
    words = rng.sample(material.words, different)
    listed = words[:_MANY] * often + words[_MANY:] * seldom
    rng.shuffle(listed)
    return Written(_COMMON.format(context=_numbered(listed)), _COMMON_PREFIX, tuple(words[:_MANY]))


def _numbered(words) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(rng: random.Random, material: Material, units: int, depth: float | None, coded: int) -> Written:
    """About `units` words out of `coded` made-up ones, the kth as often as `k ** -2`; the first of all is noise."""
    made: dict[str, None] = {}
    while len(made) < coded:
        made["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    words = ["...", *list(made)[1:]]
    counts = [int(units * rank**-_ALPHA / float(zeta(_ALPHA))) for rank in range(1, coded + 1)]
    # In a short text the third and the fourth word may come equally often, and the question would have two answers.
    counts[_ASKED + 1 :] = [min(count, counts[_ASKED] - 1) for count in counts[_ASKED + 1 :]]
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Written(_FREQUENT.format(context=" ".join(text)), _FREQUENT_PREFIX, tuple(words[1 : _ASKED + 1]))
