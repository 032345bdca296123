"""Run one strategy and sign its plan."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from flashmorph.errors import UserError, unknown
from flashmorph.inputs.settings import resolve
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Budget, Plan, Space
from flashmorph.progress import Report, silent
from flashmorph.records import SettingValues
from flashmorph.selection.strategies import DEFAULT_STRATEGY, STRATEGIES
from flashmorph.selection.strategy import Asked, Objective, Reuse, Search, Selection, State, Unasked

_GIVEN = ("search",)
_LOG = logging.getLogger(__name__)


def select(
    morphable: Morphable,
    budget: Budget | str,
    strategy: str = DEFAULT_STRATEGY,
    objective: Objective | None = None,
    seed: int = 0,
    report: Report = silent,
    say: Callable[[str], None] = _LOG.warning,
    state: State | None = None,
    **settings: Any,
) -> Selection:
    """Choose the layers of `morphable` that stay full.

    Args:
        morphable: The host with its branches.
        budget: How much may stay full: `25%`, a number of layers, or bytes of cache (`kv=64MiB@4096`); one in
            milliseconds with its costs, `Budget.parse("ms=4.2@32768").priced(Costs.load(path))`.
        strategy: A name in `STRATEGIES`.
        objective: The losses that the strategy asks for; `uniform`, `first` and `last` ask for none.
        seed: Of everything random in the search.
        report: Called with the progress.
        say: Called with what the user should know before much is spent.
        state: Where the search keeps its state; without it an interrupted search begins anew.
        settings: The strategy's own settings.

    Raises:
        UserError: an unknown strategy, a setting that is none or is wrong, a budget that leaves no choice, or no
            objective for a strategy that asks for losses.
    """
    if strategy not in STRATEGIES:
        raise UserError(unknown("strategy", strategy, STRATEGIES))
    resolved = own_settings(strategy, settings)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    space = morphable.space(budget)
    _check_options(strategy, space)
    if objective is None:
        if STRATEGIES[strategy].searches:
            raise UserError(
                f"strategy {strategy} asks for losses: give an objective, such as MorphableObjective, or a strategy "
                "that asks for none, such as uniform"
            )
        objective = cast(Objective, Unasked())
    search = Search(space, budget, objective, seed, report, say, state)
    found = STRATEGIES[strategy].run(search, **resolved)
    plan = replace(
        found.plan,
        strategy=strategy,
        seed=seed,
        scores=[dict(zip(space.options, row, strict=True)) for row in found.scores.tolist()],
    )
    return replace(found, plan=plan)


def plan_without_search(strategy: str, space: Space, budget: Budget) -> Plan:
    """The plan of a strategy that searches nothing.

    Raises:
        UserError: see `Space.limit`.
    """
    return replace(STRATEGIES[strategy].run(Search(space, budget)).plan, strategy=strategy)


def _check_options(strategy: str, space: Space) -> None:
    if STRATEGIES[strategy].two_options and len(space.options) != 2:
        raise UserError(
            f"strategy {strategy} chooses between two options; here layers can be {', '.join(space.options)}"
        )


def own_settings(strategy: str, changes: SettingValues | None = None) -> SettingValues:
    """The strategy's own settings: its defaults, and `changes` in their place, as its signature wants them.

    Raises:
        UserError: names a setting that the strategy does not have, or one that is of a wrong type or out of its range.
    """
    return resolve(STRATEGIES[strategy].run, changes or {}, _GIVEN, f"strategy {strategy}", f"strategy {strategy}: ")


def check_search(strategy: str, space: Space, budget: Budget, num_questions: int, settings: SettingValues) -> None:
    """Refuse what the strategy itself would refuse: it is started, and stopped when it asks its first question.

    Raises:
        UserError: see `own_settings` and the strategy.
    """
    resolved = own_settings(strategy, settings)
    _check_options(strategy, space)
    try:
        asked = Search(space, budget, cast(Objective, Unasked(num_questions)), say=lambda text: None)
        STRATEGIES[strategy].run(asked, **resolved)
    except Asked:
        pass


def reuse_of(strategy: str, settings: SettingValues) -> Reuse:
    """What searches by this strategy for several budgets share."""
    reuse = STRATEGIES[strategy].reuse
    return reuse(own_settings(strategy, settings)) if callable(reuse) else reuse


def asks_questions(strategy: str, settings: Mapping[str, Any]) -> bool:
    """Whether the layers that a strategy chooses depend on answers to questions."""
    return STRATEGIES[strategy].asks_questions and settings.get("data") != "text"
