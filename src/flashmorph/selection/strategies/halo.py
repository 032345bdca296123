"""HALO's ratio (arXiv 2601.22156, layer selection): keep layers that recall needs and general ability does not.

One layer of the full model is switched at a time. Layer i scores `(max R - R_i) / (max C - C_i)`, R the recall and C
the general score of that variant, the maxima over the variants (not the full model, as in the authors' code).

The paper takes accuracies: R the mean of FDA, SWDE and SQuAD, C of commonsense tasks. Stand-ins are used here: R is
`exp(-mean answer loss)` and C is `exp(-text loss)`, the geometric mean probability of an answer's and of a text's
token; both lie in (0, 1] as accuracies do.
"""

import math
from collections.abc import Sequence

from flashmorph.errors import UserError
from flashmorph.selection.measure import first_questions, mean_losses
from flashmorph.selection.moves import loss_scores
from flashmorph.selection.strategies.single_layer import single_moves
from flashmorph.selection.strategy import NumQuestions, Search, Selection, Strategy

_CAP = 50.0
_EPSILON = 1e-10


def halo_scores(general: Sequence[float], recall: Sequence[float]) -> list[float]:
    """HALO's score of each layer, from the general score and the recall `[layers]` of its single-layer variant.

    The layer with the highest general score divides by next to nothing and so reaches the cap of 50, unless its recall
    is the highest too: the published rule has it so.

    Raises:
        UserError: the two are empty, or not equally many.
    """
    if not general or len(general) != len(recall):
        raise UserError(
            f"HALO's scores need one general score and one recall a layer; got {len(general)} and {len(recall)}"
        )
    best_general, best_recall = max(general), max(recall)
    return [
        min(_CAP, (best_recall - recalled) / (best_general - able + _EPSILON))
        for able, recalled in zip(general, recall, strict=True)
    ]


def halo(search: Search, num_questions: NumQuestions = None) -> Selection:
    """HALO's ratio (arXiv 2601.22156): keep the layers that, switched alone, cost much recall for little text loss.

    Recall is taken from the first `num_questions` of the search-validation split, the general score from its text.
    Equal scores (the cap) go to the lower layer.

    Raises:
        UserError: see `Space.limit`; or an objective without text.
    """
    space, budget, objective = search.space, search.budget, search.objective
    space.limit(budget)
    _, variants = single_moves(space, budget, "switch")
    questions = first_questions(search, num_questions)
    text_losses = objective.text_losses(
        [*variants.values()], lambda share: search.report(share * len(variants), 2 * len(variants))
    )
    trace: list[dict] = [
        {"assignments": plan.assignments, "text_loss": loss}
        for plan, loss in zip(variants.values(), text_losses, strict=True)
    ]
    losses = mean_losses(search, [*variants.values()], questions, trace, total=2 * len(variants))
    values = halo_scores([math.exp(-loss) for loss in text_losses], [math.exp(-loss) for loss in losses])
    scores = loss_scores(space, dict(zip(variants, values, strict=True)))
    return Selection(space.best(scores, budget), scores, trace, objective.cost)


HALO = Strategy(halo, reuse="scores", needs_text=True)
