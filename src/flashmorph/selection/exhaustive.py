"""Exhaustive search: every plan of the budget. The truth on the search's own questions, where layers are few."""

import math
from itertools import combinations
from typing import Annotated

import numpy as np
from pydantic import Field

from flashmorph.errors import UserError
from flashmorph.plan import Budget, Space
from flashmorph.selection.measure import count_layers, first_questions, mean_losses
from flashmorph.selection.strategy import NumQuestions, Objective, Selection

_MANY = 100
"""So many plans are worth a word about their cost."""


def exhaustive(
    space: Space,
    budget: Budget,
    objective: Objective,
    seed: int,
    max_plans: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1_000,
    num_questions: NumQuestions = None,
) -> Selection:
    """Evaluate every plan on the first `num_questions` of the search-validation split and take the best.

    The scores are the best plan itself, as ones and zeros; every plan's loss is in the trace.

    Raises:
        UserError: the budget is not a count of layers or leaves no choice, or there are more than `max_plans` plans.
    """
    kept = count_layers(space, budget, "exhaustive")
    count = math.comb(len(space.groups), kept)
    if count > max_plans:
        raise UserError(
            f"strategy exhaustive would evaluate {count:,} plans ({kept} of {len(space.groups)} layers) and max_plans "
            f"is {max_plans:,}: give max_plans {count}, another budget, or a strategy such as greedy-forward"
        )
    if count > _MANY:
        greedy = sum(len(space.groups) - place for place in range(kept))
        objective.warn(f"exhaustive evaluates all {count:,} plans; greedy-forward would evaluate {greedy:,}")
    plans = [space.plan(full, budget) for full in combinations(space.groups, kept)]
    trace: list[dict] = []
    losses = mean_losses(objective, plans, first_questions(objective, num_questions), trace, total=count)
    scores = space.one_hot(plans[int(np.argmin(losses))])
    return Selection(space.best(scores, budget), scores, trace, objective.cost)
