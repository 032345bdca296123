"""Greedy forward: from all layers linear, restore the layer that helps most, again and again until the budget is spent.

Conditioned on what was chosen before, forward passes only: L + (L - 1) + ... evaluations for K layers of L.
"""

import numpy as np

from flashmorph.errors import UserError
from flashmorph.plan import FULL, Budget, Space
from flashmorph.selection.strategy import Objective, Selection, group_scores


def greedy_forward(
    space: Space, budget: Budget, objective: Objective, seed: int, num_questions: int | None = None
) -> Selection:
    """Add layers one at a time by the mean answer loss on the first `num_questions` of the search-validation split.

    A layer's score is by how much the loss fell when it was added, in steps of the order of choice.

    Raises:
        UserError: the budget is not a count of layers, or leaves no choice.
    """
    if budget.resource not in ("layers", "share"):
        raise UserError(f"strategy greedy-forward counts layers; budget {budget} does not (give 7 or 25%)")
    kept = int(space.limit(budget))
    questions = range(min(num_questions or objective.num_questions, objective.num_questions))
    chosen: list[str] = []
    trace: list[dict] = []
    total = sum(len(space.groups) - place for place in range(kept))
    for place in range(kept):
        losses = {}
        for group in space.groups:
            if group not in chosen:
                plan = space.plan([*chosen, group], budget)
                losses[group] = float(objective.evaluate(plan, questions).mean())
                trace.append({"full": plan.full_groups, "loss": losses[group]})
                objective.progress(len(trace), total, loss=min(losses.values()))
        chosen.append(min(losses, key=losses.__getitem__))
    order = np.array([kept - chosen.index(group) if group in chosen else 0 for group in space.groups], dtype=float)
    scores = group_scores(space, order.tolist(), FULL)
    return Selection(space.best(scores, budget), scores, trace, objective.cost)
