"""Names, colours and marks of models in all figures."""

from dataclasses import dataclass
from typing import Literal

from flashmorph.selection import BASELINE

_PALETTE = (
    "#2a7de1", "#e0762f", "#1f9d6b", "#b0489c", "#b08a00", "#5f6bd8", "#d24b5a", "#159aa8",
    "#8a6d4f", "#7a9a1f", "#9c5bd6", "#d0679d", "#4d8f8a", "#c2571a", "#6c7a89",
)  # fmt: skip
"""Apart from each other, and readable on white and on black."""
QUIET = "#8c8c8c"

Mark = Literal["circle", "diamond"]


@dataclass(frozen=True)
class Look:
    """The style of a series; with `mark` None it is a line without points."""

    colour: str
    mark: Mark | None = "circle"
    filled: bool = True
    dashed: bool = False
    line: bool = True


_KNOWN = {
    "teacher": ("teacher", Look(QUIET)),
    "hybrid": ("hybrid", Look(_PALETTE[0])),
    "hybrid_before_extend": ("hybrid, before extension", Look(_PALETTE[0], "diamond", filled=False)),
    "hybrid_undistilled": ("hybrid, before distillation", Look(_PALETTE[0], filled=False)),
    BASELINE: (f"{BASELINE} layout, same budget", Look(_PALETTE[1])),
    f"{BASELINE}_undistilled": (f"{BASELINE} layout, before distillation", Look(_PALETTE[1], filled=False)),
}


def colour(index: int) -> str:
    """The colour of the nth of many."""
    return _PALETTE[index % len(_PALETTE)]


def label(name: str) -> str:
    """The label of a model of results.json; other names are their own."""
    return _KNOWN[name][0] if name in _KNOWN else name


def look(name: str, index: int = 0) -> Look:
    """The style of a model; `index` gives unknown ones different colours."""
    return _KNOWN[name][1] if name in _KNOWN else Look(colour(index + 2))
