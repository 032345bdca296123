"""Run one strategy and sign its plan."""

from dataclasses import replace
from typing import Any, cast

from flashmorph.errors import UserError, unknown
from flashmorph.inputs.settings import resolve
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Budget, Space
from flashmorph.selection import SERVE_EVERY_BUDGET, STRATEGIES
from flashmorph.selection.strategy import Objective, Selection

_GIVEN = ("space", "budget", "objective", "seed")


def select(
    morphable: Morphable,
    budget: Budget | str,
    strategy: str,
    objective: Objective,
    seed: int = 0,
    **settings: Any,
) -> Selection:
    """Choose the layers of `morphable` that stay full.

    Raises:
        UserError: an unknown strategy, a setting that is none or is wrong, or a budget that leaves no choice.
    """
    if strategy not in STRATEGIES:
        raise UserError(unknown("strategy", strategy, STRATEGIES))
    resolved = own_settings(strategy, settings)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    found = STRATEGIES[strategy](morphable.space(budget), budget, objective, seed, **resolved)
    plan = replace(found.plan, strategy=strategy, seed=seed, scores=found.scores.tolist())
    return replace(found, plan=plan)


def own_settings(strategy: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The strategy's own settings: its defaults, and `changes` in their place, as its signature wants them.

    Raises:
        UserError: names a setting that the strategy does not have, or one that is of a wrong type or out of its range.
    """
    return resolve(STRATEGIES[strategy], changes or {}, _GIVEN, f"strategy {strategy}", f"strategy {strategy}: ")


def check_search(strategy: str, space: Space, budget: Budget, num_questions: int, settings: dict[str, Any]) -> None:
    """Refuse what the strategy itself would refuse: it is started, and stopped when it asks its first question.

    Raises:
        UserError: see `own_settings` and the strategy.
    """
    resolved = own_settings(strategy, settings)
    try:
        STRATEGIES[strategy](space, budget, cast(Objective, _Unasked(num_questions)), 0, **resolved)
    except _Asked:
        pass


class _Asked(Exception):
    """The strategy wants to know something: it has found nothing wrong with what it was given."""


class _Unasked:
    """An objective that knows how many questions there are, and nothing else."""

    def __init__(self, num_questions: int):
        self.num_questions = num_questions

    def __getattr__(self, name: str) -> Any:
        raise _Asked


def serves_every_budget(strategy: str, settings: dict[str, Any]) -> bool:
    """Whether the scores of one search can be cut at every budget."""
    own = own_settings(strategy, settings)
    return strategy in SERVE_EVERY_BUDGET or (own.get("random_budget", False) and not own["swaps"])


def searches_alike(strategy: str, settings: dict[str, Any]) -> bool:
    """Whether a search for one budget, its last check apart, is the search for any: its state can be shared."""
    return own_settings(strategy, settings).get("random_budget", False)
