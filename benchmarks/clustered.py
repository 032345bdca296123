"""The 95 % interval of a mean of figures of which some depend on each other."""

from collections.abc import Sequence

import numpy as np

from flashmorph.evaluation.intervals import RESAMPLES


def clustered_interval(clusters: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Percentile bootstrap of the mean of all figures, where those of one cluster depend on each other.

    A cluster (a teacher) has groups (budgets) of figures. Clusters are drawn anew, then figures within each group of
    those that were drawn: 15 figures of one teacher are not 15 independent findings.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(clusters), size=(RESAMPLES, len(clusters)))
    sums, counts = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for number, groups in enumerate(clusters):
        resamples, _ = np.nonzero(drawn == number)
        for group in groups:
            figures = np.asarray(group, dtype=float)
            draws = rng.integers(len(figures), size=(len(resamples), len(figures)))
            np.add.at(sums, resamples, figures[draws].sum(1))
            np.add.at(counts, resamples, len(figures))
    low, high = np.percentile(sums / counts, [2.5, 97.5])
    return float(low), float(high)
