"""Names for synthetic facts, cut into splits so that no key of one split occurs in another."""

import random

SPLITS = ("train", "validation", "referee", "test")
"""Keys and text of `train` serve training and search, `validation` the search's own checks, `referee` only
`compare`, and `test` only evaluation."""

_WORDS = """
add all also any argument assign attribute base build but bytes call can case check class code command contain
context count create current data default dictionary directory element else empty end entry error exception exist
expression file first follow for format found frame from function get given handle has have header implement import
index instance instead into item key level line list local man master match may member message method mode module
more must name namespace new node not number object one only open oper option other out output over parent path
pattern prefix raise range read response result return run same section self sequence server set should size some
source specified start state statement string support test text than that the then there they this time tuple type
use user value variable version was when which will with
""".split()

_SHARES = {"train": 0.46, "validation": 0.18, "referee": 0.18, "test": 0.18}


def names(split: str) -> tuple[str, ...]:
    """The words of `split`: the same for every seed and version, disjoint from the words of every other split.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    shuffled = random.Random("names").sample(_WORDS, len(_WORDS))
    start = 0
    for name, share in _SHARES.items():
        stop = start + round(share * len(_WORDS))
        if name == split:
            return tuple(shuffled[start:stop])
        start = stop
    raise AssertionError("every split has a share")
