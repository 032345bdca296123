"""What strategies that go from plan to plan share: their checks, the questions they ask, and the losses of plans."""

from collections.abc import Sequence

import numpy as np

from flashmorph.errors import UserError
from flashmorph.plan import FULL, Budget, Plan, Space
from flashmorph.selection.strategy import Objective


def check_two_options(space: Space, strategy: str) -> None:
    """Refuse a space in which a layer that is not full could be more than one thing.

    Raises:
        UserError: names the options.
    """
    if len(space.options) != 2:
        raise UserError(f"strategy {strategy} chooses between two options; this space has {', '.join(space.options)}")


def count_layers(space: Space, budget: Budget, strategy: str) -> int:
    """How many layers a plan of this budget keeps full, for a strategy that spends it a whole layer at a time.

    Bytes of cache buy as many layers as they pay for, where a full layer costs the same everywhere.

    Raises:
        UserError: the budget is neither, or leaves no choice, or the space has more than two options.
    """
    check_two_options(space, strategy)
    limit = space.limit(budget)
    if budget.resource in ("layers", "share"):
        return int(limit)
    full, other = space.cost[:, space.options.index(FULL)], space.cost[:, 1 - space.options.index(FULL)]
    if np.ptp(full - other):
        raise UserError(
            f"strategy {strategy} counts layers; budget {budget} does not, and layers' caches differ (give 7 or 25%)"
        )
    return int((limit - other.sum()) // (full - other)[0])


def first_questions(objective: Objective, num_questions: int | None) -> range:
    """The first `num_questions` of the search-validation split, or all of them (None, or more than there are)."""
    return range(min(num_questions or objective.num_questions, objective.num_questions))


def mean_losses(
    objective: Objective, plans: Sequence[Plan], questions: Sequence[int], trace: list[dict], total: int
) -> list[float]:
    """Mean answer loss in nats of each of `plans` over `questions`.

    Every plan becomes one entry of `trace`; `total` is how many entries there will be when the search ends.
    """
    before = len(trace)

    def report(share: float) -> None:
        objective.progress(before + share * len(plans), total)

    losses = objective.evaluate(plans, questions, report).mean(1).tolist()
    trace += [{"full": plan.full_groups, "loss": loss} for plan, loss in zip(plans, losses, strict=True)]
    objective.progress(len(trace), total, loss=min(losses))
    return losses
