"""Every plan of a budget, where a space is small."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np

from flashmorph.plan.budget import Budget
from flashmorph.plan.plan import Plan
from flashmorph.plan.space import Space


def every_plan(space: Space, budget: Budget) -> Iterator[Plan]:
    """The plans that spend the budget, `full` first: a count exactly; of bytes or time as much as they can.

    Raises:
        UserError: see `Space.limit`.
    """
    limit, order = space.limit(budget), space.order
    least = np.append(np.cumsum(space.cost.min(1)[::-1])[::-1], 0.0)
    most = np.append(np.cumsum(space.cost.max(1)[::-1])[::-1], 0.0)
    exact = not budget.is_amount

    def below(row: int, spent: float) -> Iterator[list[int]]:
        if spent + least[row] > limit or (exact and spent + most[row] < limit):
            return
        if row == len(order):
            yield []
            return
        for option in order[row].tolist():
            for rest in below(row + 1, spent + space.cost[row, option]):
                yield [option, *rest]

    for chosen in below(0, 0.0):
        if exact or not _has_room(space, chosen, limit):
            yield space.of_options(chosen, budget)


def count_plans(space: Space, budget: Budget, most: int) -> int:
    """The number of plans of `every_plan`; for budgets in bytes or milliseconds, counted no further than `most + 1`.

    Sums of bytes may all differ, so that plans of bytes cannot be counted without going through them.
    """
    if budget.is_amount:
        return sum(1 for _ in islice(every_plan(space, budget), most + 1))
    limit, counts = space.limit(budget), Counter({0.0: 1})
    for row in space.cost:
        more: Counter[float] = Counter()
        for spent, number in counts.items():
            for cost in row.tolist():
                more[spent + cost] += number
        counts = more
    return counts[limit]


def _has_room(space: Space, chosen: list[int], limit: float) -> bool:
    """Whether some group could have a dearer option as well."""
    own = space.cost[np.arange(len(chosen)), chosen]
    extra = space.cost - own[:, None]
    return bool(((extra > 0) & (own.sum() + extra <= limit)).any())
