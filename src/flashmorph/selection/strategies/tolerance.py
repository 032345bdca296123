"""Training-time selection under a loss tolerance: switch further layers as long as the added loss stays within it.

After Mobasheri et al., "Training-time Selection of Linear Vs. Softmax Attention" (ICLR 2026 submission 23796), whose
algorithm was not published. The number of full layers is the result, not the input.
"""

import math
from dataclasses import replace

from flashmorph.errors import UserError
from flashmorph.plan import FULL, Plan
from flashmorph.selection.strategy import Search, Selection, Share, Steps, Strategy, group_scores


def tolerance(
    search: Search,
    tolerance: Share = 0.01,
    steps: Steps = 20,
) -> Selection:
    """Switch as many layers as a tolerated loss of perplexity allows (`tolerance`, 1% by default).

    It switches the layer that text misses least, distils the whole model for `steps` steps, and keeps the switch if the
    perplexity is within the `tolerance` of the teacher's; else it takes it back for good and tries the next layer.

    The number of full layers is what it finds: `budget` is not used.
    At least one layer stays full. A layer's score is the order of switching: 0 for the one switched first, more for
    later ones, L for those that stay. Each entry of the trace tells the layer tried, the perplexity with it relative to
    the teacher's, and whether the switch was kept.

    Raises:
        UserError: no layer can be switched.
    """
    space, budget, objective = search.space, search.budget, search.objective
    [teacher] = objective.text_losses([space.plan(space.groups, budget)])
    waiting, switched, path, trace = list(space.groups), [], [], []

    def plan_without(groups: list[str]) -> Plan:
        return space.plan([group for group in space.groups if group not in groups], budget)

    def text_losses(plans: list[Plan]) -> list[float]:
        before = len(trace)
        return objective.text_losses(plans, lambda share: search.report(before + share / 2, len(space.groups)))

    while waiting and len(switched) < len(space.groups) - 1:
        candidates = [plan_without([*switched, group]) for group in waiting]
        losses = text_losses(candidates)
        best = losses.index(min(losses))
        group, candidate = waiting[best], [*path, candidates[best]]
        ratio = math.exp(objective.distill(candidate, steps).text_loss - teacher)
        kept = ratio <= 1 + tolerance
        if kept:
            switched.append(group)
            path = candidate
        waiting.remove(group)
        trace.append({"layer": group, "perplexity_ratio": ratio, "kept": kept})
        search.report(len(trace), len(space.groups), ratio=ratio)
    if not switched:
        least = min(entry["perplexity_ratio"] for entry in trace)
        raise UserError(
            f"tolerance {tolerance:.2%}: no layer can be switched within it; the mildest switch gave "
            f"{100 * (least - 1):.1f} % more perplexity after {steps} steps: allow more, or more steps"
        )
    layers = len(space.groups)
    order = [float(switched.index(group)) if group in switched else float(layers) for group in space.groups]
    scores = group_scores(space, order, FULL)
    found = replace(plan_without(switched), budget=space.count(layers - len(switched)))
    return Selection(found, scores, trace, objective.cost)


TOLERANCE = Strategy(
    tolerance,
    asks_questions=False,
    needs_text=True,
    needs_training=True,
    seeded=False,
    two_options=True,
    finds_budget=True,
)
