"""Figures of an evaluation, in the form that records and `--json` have them; `interval` is always the 95 % one."""

from typing import NotRequired, TypedDict

Interval = tuple[float, float]


class BlockMean(TypedDict):
    """A mean over tokens; what its interval is `over`, documents or blocks. None where there is a single one."""

    mean: float
    interval: Interval | None
    over: str


class Perplexity(TypedDict):
    """Perplexity of a text."""

    perplexity: float
    interval: list[float] | None
    over: str


# Keys that are no names in Python.
PerplexityAt = TypedDict(
    "PerplexityAt",
    {"from": int, "to": int, "tokens": int, "perplexity": float, "interval": list[float] | None, "over": str},
)
"""Perplexity of the tokens at positions `from` to `to`."""


class Ratio(TypedDict):
    """One model's perplexity over another's."""

    ratio: float
    interval: list[float] | None
    over: str


class TextRatio(Ratio):
    """The same for a whole text and by range of positions."""

    by_position: list[Ratio]


class Difference(TypedDict):
    """One model's figure minus another's, paired."""

    difference: float
    interval: Interval


class Recall(TypedDict):
    """The share of questions that were answered."""

    recall: float
    interval: Interval
    questions: int


class Cell(TypedDict):
    """Recall of one task at one length and depth; `first` is another model's."""

    task: str
    length: int
    depth: float | None
    recall: float
    interval: Interval
    questions: int
    first: NotRequired[float]


class TextSize(TypedDict):
    """The text behind a perplexity: its tokens, those asked for, and its documents."""

    tokens: int
    wanted: int
    documents: int
