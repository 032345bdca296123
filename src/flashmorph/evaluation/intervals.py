"""95 % intervals of shares and of paired differences."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000


def share_interval(hits: Sequence[bool]) -> tuple[float, float]:
    """Wilson's interval of the share of hits: also right at 0 and 100 %."""
    interval = binomtest(sum(hits), len(hits)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile bootstrap of the mean difference `first - second`, paired by example.

    Both are lists of groups (tasks) of figures per example; examples are drawn anew within each group.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for one, other in zip(first, second, strict=True):
        difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
        draws = rng.integers(len(difference), size=(RESAMPLES, len(difference)))
        means += difference[draws].mean(1) / len(first)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
