"""Greedy forward: from all layers linear, restore the layer that helps most, again and again until the budget is spent.

Conditioned on what was chosen before, forward passes only: L + (L - 1) + ... evaluations for K layers of L.
"""

from flashmorph.plan import FULL, Budget, Space
from flashmorph.selection.measure import count_layers, first_questions, mean_losses
from flashmorph.selection.strategy import NumQuestions, Objective, Selection, group_scores


def greedy_forward(
    space: Space, budget: Budget, objective: Objective, seed: int, num_questions: NumQuestions = None
) -> Selection:
    """Add layers one at a time by the mean answer loss on the first `num_questions` of the search-validation split.

    A layer's score is the order of choice: K for the first, 1 for the last, 0 for a layer that was not chosen. Blind
    where layers help only together: the first of them gains nothing.

    Raises:
        UserError: the budget is not a count of layers, or leaves no choice.
    """
    kept = count_layers(space, budget, "greedy-forward")
    questions = first_questions(objective, num_questions)
    chosen: list[str] = []
    trace: list[dict] = []
    total = sum(len(space.groups) - place for place in range(kept))
    for _ in range(kept):
        candidates = [group for group in space.groups if group not in chosen]
        plans = [space.plan([*chosen, group], budget) for group in candidates]
        losses = mean_losses(objective, plans, questions, trace, total)
        chosen.append(candidates[losses.index(min(losses))])
    order = [float(kept - chosen.index(group)) if group in chosen else 0.0 for group in space.groups]
    scores = group_scores(space, order, FULL)
    return Selection(space.best(scores, budget), scores, trace, objective.cost)
