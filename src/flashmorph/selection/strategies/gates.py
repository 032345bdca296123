"""FlashMorph's gates as published (arXiv 2606.30562, section 3): one scalar a layer, pulled down by an L1 penalty.

Each layer's output is `alpha * full + (1 - alpha) * other`; alpha starts at 1 and is kept in [0, 1]. The loss is the
distance of the answer tokens' hidden states to the teacher's plus `penalty * sum(alpha)`; the K largest stay full.

The paper leaves open how alpha is kept in its range (here: clamped after each step, as in DuoAttention), the optimiser
(Adam) and the reduction of the norm (the objective's: the mean over the width, so that `penalty` is on that scale).
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from flashmorph.inputs.settings import FinalRate, Rate
from flashmorph.plan import FULL
from flashmorph.selection.descend import Loss, Schedule, descend
from flashmorph.selection.strategy import Search, Selection, Steps, Strategy, group_scores

Data = Literal["questions", "text"]


def gates(
    search: Search,
    steps: Steps = 150,
    penalty: Annotated[float, Field(ge=0, le=1e6)] = 0.1,
    learning_rate: Rate = 2e-2,
    final_learning_rate: FinalRate = 2e-3,
    data: Data = "questions",
) -> Selection:
    """FlashMorph's gates as published (arXiv 2606.30562): a scalar a layer under an L1 penalty, the largest kept.

    `penalty` is the paper's lambda; ties go to the lower layer. `data` `text` aligns on all tokens of text instead of
    the answers to questions (the paper's ablation).

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    space.limit(budget)
    alpha = torch.ones(len(space.groups))
    trace = descend(
        search,
        alpha,
        to_gates=lambda alpha, step: torch.stack([alpha, 1 - alpha], 1),
        schedule=Schedule(steps, learning_rate, final_learning_rate),
        loss=Loss("hidden", data, lambda alpha: penalty * alpha.sum()),
        after_step=lambda alpha: alpha.clamp_(0, 1),
    )
    scores = group_scores(space, alpha.tolist(), FULL)
    plan = space.best(scores, budget)
    if (opened := int((alpha > 0).sum())) < len(plan.full_groups):
        search.say(
            f"gates: {opened} of {len(alpha)} gates stayed above 0 and the budget keeps {len(plan.full_groups)}: the "
            "others were taken by their number alone; a smaller penalty closes fewer"
        )
    return Selection(plan, scores, trace, search.objective.cost)


GATES = Strategy(gates, reuse="scores", gradient_loss="hidden", two_options=True, gate_label="gate α")
