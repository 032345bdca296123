"""Run one strategy and sign its plan."""

import inspect
from dataclasses import replace
from typing import Any

from flashmorph.errors import UserError
from flashmorph.morphable import Morphable
from flashmorph.plan import Budget
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
        UserError: an unknown strategy or setting, or a budget that leaves no choice.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    check_settings(strategy, settings)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    found = STRATEGIES[strategy](morphable.space(budget), budget, objective, seed, **settings)
    plan = replace(found.plan, strategy=strategy, seed=seed, scores=found.scores.tolist())
    return replace(found, plan=plan)


def check_settings(strategy: str, settings: dict[str, Any]) -> None:
    """Refuse settings that the strategy does not have.

    Raises:
        UserError: names the setting and those that there are.
    """
    known = list(own_settings(strategy))
    for name in settings:
        if name not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"strategy {strategy} has no setting {name!r}; {there_are}")


def own_settings(strategy: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The strategy's own settings: its defaults, and `changes` in their place."""
    known = inspect.signature(STRATEGIES[strategy]).parameters
    defaults = {name: parameter.default for name, parameter in known.items() if name not in _GIVEN}
    return {**defaults, **(changes or {})}


def serves_every_budget(strategy: str, settings: dict[str, Any]) -> bool:
    """Whether the scores of one search can be cut at every budget."""
    own = own_settings(strategy, settings)
    return strategy in SERVE_EVERY_BUDGET or (own.get("random_budget", False) and not own["swaps"])


def searches_alike(strategy: str, settings: dict[str, Any]) -> bool:
    """Whether a search for one budget, its last check apart, is the search for any: its state can be shared."""
    return own_settings(strategy, settings).get("random_budget", False)
