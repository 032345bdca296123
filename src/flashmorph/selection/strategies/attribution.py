"""Attribution: the change of the loss with each switch, to first order.

The gates' gradient at the full model is the gradient of the answer loss times the difference between a mixer's output
and the attention's. HydraHead (arXiv 2606.20097, appendix D) names attribution patching as its cheap proxy, there with
the output on a counterfactual text in place of the mixer's. Groups that stand in for each other look unimportant, as
with `drop-one`.
"""

from typing import Annotated

import torch
from pydantic import Field

from flashmorph.plan import FULL
from flashmorph.selection.strategy import Search, Selection, Steps, Strategy


def attribution(search: Search, steps: Steps = 8, points: Annotated[int, Field(ge=1, le=1_000)] = 4) -> Selection:
    """Keep what the answer loss would rise by most without, to first order: one backward a batch, in `steps` batches.

    With one of `points` gates are fully open. There a loss near 0 has hardly a gradient; with more, batches take
    turns at points between the full model and one with none full (integrated gradients, arXiv 1703.01365).

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    space.limit(budget)
    full, cheapest = space.plan(space.groups, budget), space.plan([], budget)
    start, end = (torch.tensor(space.one_hot(plan), dtype=torch.float32) for plan in (full, cheapest))
    rise = torch.zeros(space.cost.shape)
    trace = []
    for step in range(steps):
        way = (step % points + 0.5) / points if points > 1 else 0.0
        loss, gradient = search.objective.gradient(start + way * (end - start), step, "answers")
        rise += (gradient - gradient[:, [space.options.index(FULL)]]) / steps
        trace.append({"loss": loss, "gates": 1 - way})
        search.report(step + 1, steps, loss=loss)
    scores = -rise.numpy().astype(float)
    return Selection(space.best(scores, budget), scores, trace, search.objective.cost)


ATTRIBUTION = Strategy(attribution, reuse="scores", gradient_loss="answers")
