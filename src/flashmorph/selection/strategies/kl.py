"""KL-guided selection (KL-LS, arXiv 2512.20569): restore one layer, distil briefly, rank layers by the KL that is left.

Scores are not conditioned on each other, as in the authors' code. The paper distils each variant for hundreds of
millions of tokens in rows of 4,096 at a constant rate and finds the ranking settled after 25 to 40 % of them. Here
rows, rate and schedule are those of the stage `distill`, for `steps` steps; in its rows of 512 tokens, documents apart,
the KL says next to nothing of retrieval over a distance.
"""

from flashmorph.selection.moves import gain_scores
from flashmorph.selection.strategies.single_layer import single_moves
from flashmorph.selection.strategy import Search, Selection, Steps, Strategy


def kl(search: Search, steps: Steps = 20) -> Selection:
    """KL-guided selection (KL-LS, arXiv 2512.20569): restore one layer, distil for `steps` steps, rank by the KL left.

    A score is how much less KL is left than by the worst layer, in nats a token. Costs L short distillations and serves
    every budget.

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget, objective = search.space, search.budget, search.objective
    space.limit(budget)
    _, variants = single_moves(space, budget, "restore")
    trace: list[dict] = []
    for plan in variants.values():
        left = objective.distill([plan], steps).kl
        trace.append({"assignments": plan.assignments, "kl": left})
        search.report(len(trace), len(variants), kl=left)
    worst = max(entry["kl"] for entry in trace)
    gains = {move: worst - entry["kl"] for move, entry in zip(variants, trace, strict=True)}
    scores = gain_scores(space, gains)
    return Selection(space.best(scores, budget), scores, trace, objective.cost)


KL = Strategy(kl, reuse="scores", asks_questions=False, needs_text=True, needs_training=True, seeded=False)
