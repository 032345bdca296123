"""Run one strategy and sign its plan."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from flashmorph.errors import UserError, unknown
from flashmorph.inputs.settings import resolve
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Budget, Space
from flashmorph.selection.strategies import STRATEGIES
from flashmorph.selection.strategy import Objective, Reuse, Selection

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
    space = morphable.space(budget)
    _check_options(strategy, space)
    found = STRATEGIES[strategy].run(space, budget, objective, seed, **resolved)
    plan = replace(found.plan, strategy=strategy, seed=seed, scores=found.scores.tolist())
    return replace(found, plan=plan)


def _check_options(strategy: str, space: Space) -> None:
    if STRATEGIES[strategy].two_options and len(space.options) != 2:
        raise UserError(
            f"strategy {strategy} chooses between two options; here layers can be {', '.join(space.options)}"
        )


def own_settings(strategy: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The strategy's own settings: its defaults, and `changes` in their place, as its signature wants them.

    Raises:
        UserError: names a setting that the strategy does not have, or one that is of a wrong type or out of its range.
    """
    return resolve(STRATEGIES[strategy].run, changes or {}, _GIVEN, f"strategy {strategy}", f"strategy {strategy}: ")


def check_search(strategy: str, space: Space, budget: Budget, num_questions: int, settings: dict[str, Any]) -> None:
    """Refuse what the strategy itself would refuse: it is started, and stopped when it asks its first question.

    Raises:
        UserError: see `own_settings` and the strategy.
    """
    resolved = own_settings(strategy, settings)
    _check_options(strategy, space)
    try:
        STRATEGIES[strategy].run(space, budget, cast(Objective, _Unasked(num_questions)), 0, **resolved)
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


def reuse_of(strategy: str, settings: dict[str, Any]) -> Reuse:
    """What searches by this strategy for several budgets share."""
    reuse = STRATEGIES[strategy].reuse
    return reuse(own_settings(strategy, settings)) if callable(reuse) else reuse


def asks_questions(strategy: str, settings: Mapping[str, Any]) -> bool:
    """Whether the layers that a strategy chooses depend on answers to questions."""
    return STRATEGIES[strategy].asks_questions and settings.get("data") != "text"
