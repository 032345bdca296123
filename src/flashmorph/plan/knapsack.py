"""A multiple-choice knapsack, solved exactly (docs/decisions/0007)."""

import numpy as np


def knapsack(scores: np.ndarray, cost: np.ndarray, limit: float, exact: bool) -> list[int] | None:
    """One option a row, with the largest summed score at a cost of `limit` (or at most `limit`); None: there is none.

    Row by row from the last one up, all partial plans are kept for which no other costs as little and comes before it:
    by its sum or, of equal sums, by the first option of the first row in which the two differ.
    """
    values = _summable(scores)
    totals, sums, rank = np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    kept: list[np.ndarray] = []
    cheapest = np.append(0.0, np.cumsum(cost.min(1))[:-1])
    for row in reversed(range(len(cost))):
        # Option by option, so that the order of plans is that of their options.
        total, value = (totals + cost[row][:, None]).ravel(), (sums + values[row][:, None]).ravel()
        order = (np.arange(cost.shape[1])[:, None] * len(rank) + rank).ravel()
        fits = np.flatnonzero(total + cheapest[row] <= limit)
        fits = fits[np.lexsort((order[fits], -value[fits]))]
        # From here on `fits` is in order of preference; sorted by cost, a number is how many are preferred.
        by_cost = np.argsort(total[fits], kind="stable")
        if exact:
            keep = np.append(True, np.diff(total[fits][by_cost]) > 0)
        else:
            keep = np.append(True, by_cost[1:] < np.minimum.accumulate(by_cost)[:-1])
        fits = fits[by_cost[keep[: len(by_cost)]]]
        kept.append(fits)
        totals, sums = total[fits], value[fits]
        rank = np.argsort(np.argsort(order[fits]))
    allowed = np.flatnonzero(totals == limit) if exact else np.arange(len(totals))
    if not len(allowed):
        return None
    state, chosen = allowed[np.lexsort((rank[allowed], -sums[allowed]))[0]], []
    for row, fits in enumerate(reversed(kept)):
        states = len(kept[-row - 2]) if row + 1 < len(kept) else 1
        option, state = divmod(fits[state], states)
        chosen.append(int(option))
    return chosen


def _summable(scores: np.ndarray) -> np.ndarray:
    """Scores as whole numbers of one small power of two, whose sums are exact: equal plans come out equal.

    What rounding changes is less than what sums in float64 may lose.
    """
    _, exponent = np.frexp(np.abs(scores).max())
    return np.rint(np.ldexp(scores, 62 - int(exponent) - len(scores).bit_length())).astype(np.int64)
