"""NLL-guided selection (arXiv 2606.27791): rank layers by what each alone does to the likelihood of the answers.

The published summary tells of the loss when a layer is switched, the method's text of the gain when a layer is
restored; both are offered. The paper switches the prompt's layers only and answers with full attention; a plan here
holds for prompt and answer alike.
"""

from flashmorph.plan import Budget, Space
from flashmorph.selection.single_layer import Direction, score_single_layers
from flashmorph.selection.strategy import NumQuestions, Objective, Selection


def nll(
    space: Space,
    budget: Budget,
    objective: Objective,
    seed: int,
    direction: Direction = "restore",
    num_questions: NumQuestions = 64,
) -> Selection:
    """Rank layers once by the answers' negative log-likelihood: `direction` is `restore` or `switch`.

    A score is the difference of the mean answer loss to the base, in nats; the paper asks 64 questions. The loss is
    that of every strategy here, so `restore` measures what add-one does and `switch` what drop-one does.

    Raises:
        UserError: see `score_single_layers`.
    """
    return score_single_layers(space, budget, objective, direction, num_questions, "nll")
