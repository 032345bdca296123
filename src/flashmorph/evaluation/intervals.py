"""95 % intervals of shares, of ratios and of paired differences."""

from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 10_000
_QUANTILE = 1.959963984540054
_DRAWN_AT_ONCE = 2_000_000


def share_interval(hits: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval of the share of hits: also right at 0 and 100 %.

    A hit may be a part of 1: figures between 0 and 1 vary less than yes and no at the same mean, so the interval is
    then rather too wide than too narrow.
    """
    count, share = len(hits), float(np.mean(hits))
    square = _QUANTILE**2 / count
    centre = (share + square / 2) / (1 + square)
    half = _QUANTILE * np.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def paired_share_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The interval of the mean difference `first - second` of shares, paired by example; both as in `paired_interval`.

    After Agresti and Min (Statistics in Medicine 24, 2005), who add half a pair to each of the four outcomes of one
    group; here a square root's share of that to each group, which covers best. Where two models answer all of few
    questions, a bootstrap has no width.
    """
    extra, centre, variance = 2 / np.sqrt(len(first)), 0.0, 0.0
    for one, other in zip(first, second, strict=True):
        difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
        count = len(difference) + extra
        mean = difference.sum() / count
        centre += mean / len(first)
        variance += ((np.square(difference).sum() + extra / 2) / count - mean**2) / count / len(first) ** 2
    half = _QUANTILE * np.sqrt(variance)
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def paired_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile bootstrap of the mean difference `first - second`, paired by example.

    Both are lists of groups (tasks) of figures per example; examples are drawn anew within each group.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for one, other in zip(first, second, strict=True):
        difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
        for some, draws in _draws(rng, len(difference)):
            means[some] += difference[draws].mean(1) / len(first)
    return _ends(means)


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap of `sums.sum() / counts.sum()`, both `[rows]`; whole rows are drawn.

    Tokens of one row depend on each other, so a row is the unit, and rows without a token of the kind count as such.
    """
    ratios = []
    for _, draws in _draws(np.random.default_rng(0), len(sums)):
        total = counts[draws].sum(1)
        ratios.append(sums[draws].sum(1)[total > 0] / total[total > 0])
    return _ends(np.concatenate(ratios))


def _draws(rng: np.random.Generator, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """All resamples of `count` figures: which ones, and their indices `[resamples, count]`, as many as memory takes."""
    size = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, RESAMPLES, size):
        end = min(start + size, RESAMPLES)
        yield slice(start, end), rng.integers(count, size=(end - start, count))


def _ends(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
