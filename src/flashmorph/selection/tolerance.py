"""Training-time selection under a loss tolerance: switch further layers as long as the added loss stays within it.

After Mobasheri et al., "Training-time Selection of Linear Vs. Softmax Attention" (ICLR 2026 submission 23796), whose
algorithm was not published. The number of full layers is the result, not the input: the budget is `loss=1%`.
"""

import math
from dataclasses import replace

from flashmorph.errors import UserError
from flashmorph.plan import FULL, Budget, Plan, Space
from flashmorph.selection.measure import check_two_options
from flashmorph.selection.strategy import Objective, Selection, Steps, group_scores


def tolerance(space: Space, budget: Budget, objective: Objective, seed: int, steps: Steps = 20) -> Selection:
    """Switch the layer that text misses least, distil the whole model for `steps` steps, and keep the switch if the
    perplexity is within the budget of the teacher's; else take it back for good and try the next layer.

    At least one layer stays full. A layer's score is the order of switching: 0 for the one switched first, more for
    later ones, L for those that stay. Each entry of the trace tells the layer tried, the perplexity with it relative to
    the teacher's, and whether the switch was kept.

    Raises:
        UserError: more than two options, a budget that is no loss, or no layer can be switched.
    """
    check_two_options(space, "tolerance")
    if budget.resource != "loss":
        raise UserError(f"strategy tolerance finds the number of full layers itself: give loss=1%, not {budget}")
    teacher = objective.text_loss(space.plan(space.groups, budget))
    waiting, switched, path, trace = list(space.groups), [], [], []

    def plan_without(groups: list[str]) -> Plan:
        return space.plan([group for group in space.groups if group not in groups], budget)

    while waiting and len(switched) < len(space.groups) - 1:
        added = {group: objective.text_loss(plan_without([*switched, group])) for group in waiting}
        group = min(waiting, key=added.__getitem__)
        candidate = [*path, plan_without([*switched, group])]
        ratio = math.exp(objective.distill(candidate, steps).text_loss - teacher)
        kept = ratio <= 1 + budget.limit
        if kept:
            switched.append(group)
            path = candidate
        waiting.remove(group)
        trace.append({"layer": group, "perplexity_ratio": ratio, "kept": kept})
        objective.progress(len(trace), len(space.groups), ratio=ratio)
    if not switched:
        least = min(entry["perplexity_ratio"] for entry in trace)
        raise UserError(
            f"budget {budget}: no layer can be switched within it; the mildest switch gave {100 * (least - 1):.1f} % "
            f"more perplexity after {steps} steps: allow more, or more steps"
        )
    layers = len(space.groups)
    order = [float(switched.index(group)) if group in switched else float(layers) for group in space.groups]
    scores = group_scores(space, order, FULL)
    found = space.best(scores, Budget("layers", layers - len(switched)))
    return Selection(replace(found, budget=budget), scores, trace, objective.cost)
