"""Greedy backward: from all layers full, switch the layer that hurts least, again and again until the budget is met.

The counterpart of greedy forward that sees layers which help only together; L + (L - 1) + ... + (K + 1) evaluations,
so it is the dearer one for small budgets. KL-LS calls it greedy removal (arXiv 2512.20569, ablation).
"""

from flashmorph.plan import FULL, Budget, Space
from flashmorph.selection.measure import count_layers, first_questions, mean_losses
from flashmorph.selection.strategy import NumQuestions, Objective, Selection, group_scores


def greedy_backward(
    space: Space, budget: Budget, objective: Objective, seed: int, num_questions: NumQuestions = None
) -> Selection:
    """Switch layers one at a time by the mean answer loss on the first `num_questions` of the search-validation split.

    A layer's score is how long it stayed full: 0 for the one switched first, L - K for those that stay.

    Raises:
        UserError: the budget is not a count of layers, or leaves no choice.
    """
    kept = count_layers(space, budget, "greedy-backward")
    questions = first_questions(objective, num_questions)
    switched: list[str] = []
    trace: list[dict] = []
    layers = len(space.groups)
    total = sum(range(kept + 1, layers + 1))
    for _ in range(layers - kept):
        full = [group for group in space.groups if group not in switched]
        plans = [space.plan([other for other in full if other != group], budget) for group in full]
        losses = mean_losses(objective, plans, questions, trace, total)
        switched.append(full[losses.index(min(losses))])
    stayed = [float(switched.index(group)) if group in switched else float(layers - kept) for group in space.groups]
    scores = group_scores(space, stayed, FULL)
    return Selection(space.best(scores, budget), scores, trace, objective.cost)
