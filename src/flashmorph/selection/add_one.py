"""Add-one: how much the loss falls when one layer of the all-linear model is restored.

The measurement that KL-LS ranks by (arXiv 2512.20569, section 3), without its distillation of every variant.
"""

from flashmorph.plan import Budget, Space
from flashmorph.selection.single_layer import score_single_layers
from flashmorph.selection.strategy import NumQuestions, Objective, Selection


def add_one(
    space: Space, budget: Budget, objective: Objective, seed: int, num_questions: NumQuestions = None
) -> Selection:
    """Restore one layer of the all-linear model, and keep the layers that help most.

    A score is the fall of the mean answer loss, in nats, on the first `num_questions` of the search-validation split.
    Keeps two layers that do the same thing, and sees nothing where layers help only together.

    Raises:
        UserError: see `score_single_layers`.
    """
    return score_single_layers(space, budget, objective, "restore", num_questions, "add-one")
