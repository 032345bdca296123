"""The truth about one budget: the loss of every plan on every question of the referee's split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashmorph.errors import UserError
from flashmorph.plan import Budget, Plan, Space, count_plans, every_plan
from flashmorph.records import Figures
from flashmorph.selection.strategy import Objective

RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Truth:
    """A `Reference` whose plan is the best of all.

    `losses` is `[plans, questions]`, in nats; `means` what it comes to for each plan.
    """

    plans: tuple[Plan, ...]
    losses: np.ndarray
    name: str = "optimum"

    @cached_property
    def means(self) -> np.ndarray:
        """Mean loss of each plan."""
        return self.losses.mean(1)

    @property
    def best(self) -> Plan:
        """The plan of the lowest mean loss."""
        return self.plans[int(self.means.argmin())]

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.best

    def loss(self, plan: Plan) -> float:
        """Mean loss of `plan`."""
        return float(self.means[self._index(plan)])

    def regret(self, plan: Plan) -> float:
        """Mean loss of `plan` minus that of the best plan."""
        return float(self.means[self._index(plan)] - self.means.min())

    def rank(self, plan: Plan) -> int:
        """1 where `plan` is not distinguishable from the best one, else 1 + the number of plans that are better.

        Better means that the paired bootstrap's 95 % interval of the difference of mean losses lies below 0; questions
        are drawn anew `RESAMPLES` times, the same ones for all plans.
        """
        index = self._index(plan)
        if self._is_first[index]:
            return 1
        differences = self._resampled - self._resampled[:, [index]]
        return 1 + int((np.quantile(differences, (1 + CONFIDENCE) / 2, axis=0) < 0).sum())

    @cached_property
    def _resampled(self) -> np.ndarray:
        """Mean losses on questions drawn anew, `[resamples, plans]`."""
        questions = self.losses.shape[1]
        draws = np.random.default_rng(0).multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES)
        return draws @ self.losses.T / questions

    @cached_property
    def _is_first(self) -> np.ndarray:
        """Whether each plan cannot be told from the best one, `[plans]`."""
        differences = self._resampled[:, [int(self.means.argmin())]] - self._resampled
        return np.quantile(differences, (1 + CONFIDENCE) / 2, axis=0) >= 0

    def half_width(self, plan: Plan) -> None:
        """None: the best plan was chosen by the same questions, so an interval of the regret would be biased."""

    def to_dict(self) -> Figures:
        """The number of plans, the best one, and all that rank first beside it."""
        means = self.means
        return {
            "reference": "enumerated",
            "plans": len(means),
            "questions": self.losses.shape[1],
            "best": self.best.assignments,
            "best_loss": float(means.min()),
            "median_loss": float(np.median(means)),
            "first": [self.plans[at].assignments for at in np.argsort(means) if self._is_first[at]],
        }

    def _index(self, plan: Plan) -> int:
        for index, other in enumerate(self.plans):
            if other.assignments == plan.assignments:
                return index
        raise ValueError(f"{plan.strip()} is no plan of budget {self.plans[0].budget}")


def require_few(space_of: Callable[[Budget], Space], budgets: Sequence[Budget], max_plans: int) -> None:
    """Refuse budgets with more than `max_plans` plans together; `space_of` is that of `find_truths`.

    Raises:
        UserError: there are more.
    """
    spaces = [space_of(budget) for budget in budgets]
    count = sum(count_plans(space, budget, max_plans) for space, budget in zip(spaces, budgets, strict=True))
    if count > max_plans:
        # Of bytes and milliseconds no more than that were counted.
        more = " or more" if any(budget.is_amount for budget in budgets) else ""
        raise UserError(
            f"the referee would evaluate {count:,} plans{more} of {len(spaces[0].groups)} layers and max_plans is "
            f"{max_plans:,}: give smaller budgets, or more plans, or --reference found, which judges by the best known "
            "plan instead"
        )


def find_truths(
    space_of: Callable[[Budget], Space],
    budgets: Sequence[Budget],
    objective: Objective,
    max_plans: int,
    report: Callable[[float], None] | None = None,
) -> dict[str, Truth]:
    """Evaluate every plan of every budget, all together; a truth for each budget by its name.

    `space_of` gives the space of plans with its cost in a budget's resource.

    Raises:
        UserError: there are more than `max_plans` plans.
    """
    require_few(space_of, budgets, max_plans)
    plans = [tuple(every_plan(space_of(budget), budget)) for budget in budgets]
    losses = objective.evaluate([plan for some in plans for plan in some], report=report)
    truths, start = {}, 0
    for budget, some in zip(budgets, plans, strict=True):
        truths[str(budget)] = Truth(some, losses[start : start + len(some)])
        start += len(some)
    return truths
