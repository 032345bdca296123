"""Exhaustive search: every plan of the budget. The truth on the search's own questions, where layers are few."""

from typing import Annotated

import numpy as np
from pydantic import Field

from flashmorph.errors import UserError
from flashmorph.plan import count_plans, every_plan
from flashmorph.selection.measure import first_questions, mean_losses
from flashmorph.selection.moves import most_moves
from flashmorph.selection.strategy import NumQuestions, Search, Selection, Strategy

_MANY = 100
"""Above this many plans, warn about the cost."""


def exhaustive(
    search: Search,
    max_plans: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1_000,
    num_questions: NumQuestions = None,
) -> Selection:
    """Evaluate every plan of the budget and take the best; for few layers.

    On the first `num_questions` of the search-validation split. The scores are the best plan itself, as ones and zeros;
    every plan's loss is in the trace.

    Raises:
        UserError: see `Space.limit`; or there are more than `max_plans` plans.
    """
    space, budget = search.space, search.budget
    count = count_plans(space, budget, max_plans)
    if count > max_plans:
        # Of bytes and milliseconds no more than that were counted.
        number, enough = (
            (f"{count:,}", f"max_plans {count}")
            if not budget.is_amount
            else (f"more than {max_plans:,}", "a larger max_plans")
        )
        raise UserError(
            f"strategy exhaustive would evaluate {number} plans of {len(space.groups)} groups and max_plans is "
            f"{max_plans:,}: give {enough}, another budget, or a strategy such as greedy-forward"
        )
    if count > _MANY:
        greedy = sum(len(space.groups) - number for number in range(most_moves(space, budget)))
        search.say(f"exhaustive evaluates all {count:,} plans; greedy-forward would evaluate {greedy:,}")
    plans = [*every_plan(space, budget)]
    trace: list[dict] = []
    losses = mean_losses(search, plans, first_questions(search, num_questions), trace, total=len(plans))
    best = plans[int(np.argmin(losses))]
    return Selection(best, space.one_hot(best), trace, search.objective.cost)


EXHAUSTIVE = Strategy(exhaustive, enumerates=True)
