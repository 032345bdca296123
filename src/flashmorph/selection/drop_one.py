"""Drop-one: how much the loss rises when one layer of the full model is switched.

The rule that HALO's code calls "jet-nemotron" (thunlp/hybrid-linear-attention: recall of the full model minus recall
with layer i switched), with the answer loss in place of a recall. Jet-Nemotron's own PostNAS (arXiv 2508.15884) goes
further and searches a trained supernet.
"""

from flashmorph.plan import Budget, Space
from flashmorph.selection.single_layer import score_single_layers
from flashmorph.selection.strategy import NumQuestions, Objective, Selection


def drop_one(
    space: Space, budget: Budget, objective: Objective, seed: int, num_questions: NumQuestions = None
) -> Selection:
    """Switch one layer of the full model, and keep the layers whose loss hurts most.

    A score is the rise of the mean answer loss, in nats, on the first `num_questions` of the search-validation split.
    Blind where layers are redundant: none of two that stand in for each other is missed alone.

    Raises:
        UserError: see `score_single_layers`.
    """
    return score_single_layers(space, budget, objective, "switch", num_questions, "drop-one")
