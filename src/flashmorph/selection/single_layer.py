"""Scores from plans that differ in one layer from all full or from all linear: one evaluation a layer, no gradient.

Such a score sees a layer alone. Where layers stand in for each other it misleads: switched alone, none of them is
missed; restored alone, each looks as good as the others together.
"""

from typing import Literal

from flashmorph.plan import FULL, Budget, Plan, Space
from flashmorph.selection.measure import check_two_options, first_questions, mean_losses
from flashmorph.selection.strategy import Objective, Selection, group_scores

Direction = Literal["restore", "switch"]


def single_layer_plans(space: Space, budget: Budget, direction: Direction) -> tuple[Plan, list[Plan]]:
    """The base plan, and for each group the plan that differs from it there.

    `restore`: nothing is full, then one layer; `switch`: everything is full, then all but one layer.
    """
    if direction == "restore":
        return space.plan([], budget), [space.plan([group], budget) for group in space.groups]
    without = [[other for other in space.groups if other != group] for group in space.groups]
    return space.plan(space.groups, budget), [space.plan(rest, budget) for rest in without]


def score_single_layers(
    space: Space,
    budget: Budget,
    objective: Objective,
    direction: Direction,
    num_questions: int | None,
    strategy: str,
) -> Selection:
    """Keep the layers that alone make the largest difference in mean answer loss, in nats, to the base plan.

    Costs L + 1 evaluations and serves every budget.

    Raises:
        UserError: more than two options, or a budget that leaves no choice.
    """
    check_two_options(space, strategy)
    space.limit(budget)
    base, variants = single_layer_plans(space, budget, direction)
    questions = first_questions(objective, num_questions)
    trace: list[dict] = []
    start, *losses = mean_losses(objective, [base, *variants], questions, trace, total=len(variants) + 1)
    gains = [start - loss if direction == "restore" else loss - start for loss in losses]
    scores = group_scores(space, gains, FULL)
    return Selection(space.best(scores, budget), scores, trace, objective.cost)
