"""KL-guided selection (KL-LS, arXiv 2512.20569): restore one layer, distil briefly, rank layers by the KL that is left.

Scores are not conditioned on each other, as in the authors' code. The paper distils each variant for hundreds of
millions of tokens and finds the ranking settled after 25 to 40 % of them; `steps` says how many steps are run here.
"""

from flashmorph.plan import FULL, Budget, Space
from flashmorph.selection.measure import check_two_options
from flashmorph.selection.single_layer import single_layer_plans
from flashmorph.selection.strategy import Objective, Selection, Steps, group_scores


def kl(space: Space, budget: Budget, objective: Objective, seed: int, steps: Steps = 20) -> Selection:
    """Keep the layers whose single restoration leaves the least KL to the teacher after `steps` distillation steps.

    A score is how much less KL is left than by the worst layer, in nats a token. Costs L short distillations and serves
    every budget.

    Raises:
        UserError: more than two options, or a budget that leaves no choice.
    """
    check_two_options(space, "kl")
    space.limit(budget)
    _, variants = single_layer_plans(space, budget, "restore")
    trace: list[dict] = []
    for plan in variants:
        left = objective.distill([plan], steps).kl
        trace.append({"full": plan.full_groups, "kl": left})
        objective.progress(len(trace), len(variants), kl=left)
    worst = max(entry["kl"] for entry in trace)
    scores = group_scores(space, [worst - entry["kl"] for entry in trace], FULL)
    return Selection(space.best(scores, budget), scores, trace, objective.cost)
