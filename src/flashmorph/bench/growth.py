"""How cost grows with the context, and from which context on one model is cheaper than another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmorph.records import Figures


@dataclass(frozen=True)
class Growth:
    """Seconds of several tries at each context length: `lengths` `[lengths]` in tokens, `tries` `[lengths, tries]`."""

    lengths: list[int]
    tries: list[list[float]]

    @property
    def medians(self) -> list[float]:
        """The median of each length."""
        return [float(np.median(tries)) for tries in self.tries]

    def to_list(self) -> list[Figures]:
        """Seconds with quartiles, as JSON values."""
        return [{"length": length, **spread(tries)} for length, tries in zip(self.lengths, self.tries, strict=True)]


def spread(figures: Sequence[float]) -> Figures:
    """The median and the quartiles."""
    low, high = np.percentile(figures, [25, 75])
    return {"median": float(np.median(figures)), "quartiles": (float(low), float(high))}


def exponent(lengths: Sequence[int], costs: Sequence[float]) -> float | None:
    """The power of the context length that the cost grows with: the slope of the line through the logarithms.

    None with fewer than two lengths.
    """
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(costs), 1)[0])


def crossing(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The context length from which on a ratio of costs stays below 1; None if it is not below 1 at the longest.

    Between two lengths the ratio is taken as a power of the length; the shortest stands for itself and all below.
    """
    if ratios[-1] >= 1:
        return None
    last = max((index for index, ratio in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return float(lengths[0])
    low, high = math.log(ratios[last]), math.log(ratios[last + 1])
    share = low / (low - high)
    return math.exp(math.log(lengths[last]) + share * math.log(lengths[last + 1] / lengths[last]))
