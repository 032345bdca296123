"""Gates with the budget inside the optimisation: perturbed top-K with straight-through gradients.

Every step draws Gumbel noise on the logits, runs the *hard* plan of `Space.best` (so the search sees what will be
built, and rounding loses nothing), and sends the gradient of the hard gates back to the logits, projected onto the
budget's plane. The noise falls as the search settles. There is no penalty to tune. One search serves every budget, and
it may be short: at the end of it the plan races against plans with another layer instead, those first that the gates'
gradient names, forward passes only.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from flashmorph.inputs.settings import FinalRate, Rate
from flashmorph.plan import FULL, Budget, Space
from flashmorph.selection.descend import Loss, Schedule, descend
from flashmorph.selection.racing import improve_by_swaps
from flashmorph.selection.respending import improve_by_respending
from flashmorph.selection.strategy import Reuse, Search, Selection, Steps, Strategy, Swaps

Noise = Annotated[float, Field(ge=0, le=1_000)]
"""The scale of the Gumbel noise on the logits."""


def budgeted_gates(
    search: Search,
    steps: Steps = 24,
    learning_rate: Rate = 0.1,
    final_learning_rate: FinalRate = 0.1,
    noise: Noise = 1.0,
    final_noise: Noise = 0.2,
    random_budget: bool = True,
    shared_moment: bool = True,
    swaps: Annotated[int, Field(ge=0, le=1_000)] = 6,
    candidates: Annotated[int, Field(ge=1, le=1_000_000)] = 8,
) -> Selection:
    """Gates learnt jointly with the budget inside the optimisation, then races for the weakest layers; the default.

    It learns logits `[groups, options]`; the plan is the best one by the final ones. With `random_budget` each step
    spends its own budget, from the smallest that buys a layer to nearly all, so that the logits do not depend on
    `budget` and one search serves every count. With `shared_moment` steps keep the proportions of the gradients
    (`SharedAdam`) instead of being equally long for every logit. The logits cannot say that one layer makes up for
    another; so at the end the plan races against its `candidates` most promising one-swap neighbours, and the winner
    again, in at most `swaps` rounds (`improve_by_swaps`; 0 for none). Of more than two options, or where groups cost
    differently, it races against plans that spend the budget otherwise (`improve_by_respending`); the scores then are
    those before the races.

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    space.limit(budget)
    rng = np.random.default_rng(search.seed)
    draws = rng.gumbel(size=(steps, *space.cost.shape))
    budgets = _random_budgets(space, budget, rng, steps) if random_budget else [budget] * steps
    logits = torch.zeros(space.cost.shape)

    def hard_gates(logits: torch.Tensor, step: int) -> torch.Tensor:
        scale = noise + (final_noise - noise) * step / max(1, steps - 1)
        plan = space.best(logits.detach().numpy() + scale * draws[step], budgets[step])
        hard = torch.tensor(space.one_hot(plan), dtype=logits.dtype)
        return hard + _project(logits, space) - _project(logits, space).detach()

    schedule = Schedule(steps, learning_rate, final_learning_rate, shared_moment)
    trace = descend(search, logits, hard_gates, schedule, Loss("answers"))
    # Relative to each group's cheapest option, and none below it: a budget of bytes leaves out what scores less.
    least = space.order[:, 1:2]
    scores = logits.numpy() - np.take_along_axis(logits.numpy(), least, 1)
    dearer = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(dearer, least, False, 1)
    scores = np.where(dearer, scores - scores[dearer].min(), 0.0)
    if swaps and _only_exchanges(space):
        scores = improve_by_swaps(search, scores, Swaps(swaps, candidates), steps, trace)
    plan = space.best(scores, budget)
    if swaps and not _only_exchanges(space):
        plan = improve_by_respending(search, plan, Swaps(swaps, candidates), steps, trace)
    return Selection(plan, scores, trace, search.objective.cost)


def _only_exchanges(space: Space) -> bool:
    """Whether every other plan of the budget is some exchanges of two groups away, and none saves anything."""
    return space.costs_alike and len(space.options) == 2


def _reuse(settings: Mapping[str, Any]) -> Reuse:
    """With random budgets the logits do not depend on the budget; the races at its end do."""
    if not settings["random_budget"]:
        return "nothing"
    return "state" if settings["swaps"] else "scores"


BUDGETED_GATES = Strategy(
    budgeted_gates,
    reuse=_reuse,
    gradient_loss="answers",
    swaps=lambda settings: Swaps(settings["swaps"], settings["candidates"]),
)


def _random_budgets(space: Space, budget: Budget, rng: np.random.Generator, steps: int) -> list[Budget]:
    """A budget for each step, of the kind of `budget`."""
    if not budget.is_amount:
        return [space.count(int(kept)) for kept in rng.integers(1, len(space.groups), size=steps)]
    full, rest = space.cost[:, space.options.index(FULL)], space.cost.min(1)
    limits = rng.uniform(rest.sum() + (full - rest).min(), full.sum(), size=steps)
    return [replace(budget, limit=budget.base + float(limit)) for limit in limits]


def _project(logits: torch.Tensor, space: Space) -> torch.Tensor:
    """Logits without the directions that no plan of this budget can move in.

    Rows are centred (a group's gates add up to 1) and the component along the cost is taken out (the budget is spent).
    """
    centred = logits - logits.mean(1, keepdim=True)
    cost = torch.tensor(space.cost, dtype=logits.dtype)
    cost = cost - cost.mean(1, keepdim=True)
    return centred - cost * (centred * cost).sum() / (cost * cost).sum()
