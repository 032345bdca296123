"""Scores from plans that differ in one layer from all full or from none full: one evaluation a move, no gradient.

Such a score sees a layer alone. Where layers stand in for each other it misleads: switched alone, none of them is
missed; restored alone, each looks as good as the others together.

`drop-one` is the rule that HALO's code calls "jet-nemotron" (thunlp/hybrid-linear-attention: recall of the full model
minus recall with layer i switched), with the answer loss in place of a recall; Jet-Nemotron's own PostNAS
(arXiv 2508.15884) goes further and searches a trained supernet. `add-one` is the measurement that KL-LS ranks by
(arXiv 2512.20569, section 3), without its distillation of every variant. `nll` is NLL-guided selection
(arXiv 2606.27791): its published summary tells of the loss when a layer is switched, the method's text of the gain when
a layer is restored; both are offered. The paper switches the prompt's layers only and answers with full attention; a
plan here holds for prompt and answer alike.
"""

from typing import Literal

from flashmorph.plan import Budget, Plan, Space
from flashmorph.selection.measure import first_questions, mean_losses
from flashmorph.selection.moves import Move, every_move, gain_scores, loss_scores, moved, plan_of_all, plan_of_none
from flashmorph.selection.strategy import NumQuestions, Search, Selection, Strategy

Direction = Literal["restore", "switch"]


def single_moves(space: Space, budget: Budget, direction: Direction) -> tuple[Plan, dict[Move, Plan]]:
    """The base plan, and for each move the plan that differs from it there.

    `restore`: nothing is full, then one layer has a dearer option; `switch`: all is full, then one layer is not.
    """
    base = plan_of_none(space, budget) if direction == "restore" else plan_of_all(space, budget)
    return base, {move: moved(base, move) for move in every_move(space, base)}


def _score(search: Search, direction: Direction, questions: int | None) -> Selection:
    """Keep the layers that alone make the largest difference in mean answer loss, in nats, to the base plan."""
    space, budget = search.space, search.budget
    space.limit(budget)
    base, variants = single_moves(space, budget, direction)
    asked = first_questions(search, questions)
    trace: list[dict] = []
    start, *losses = mean_losses(search, [base, *variants.values()], asked, trace, total=len(variants) + 1)
    if direction == "restore":
        scores = gain_scores(space, {move: start - loss for move, loss in zip(variants, losses, strict=True)})
    else:
        scores = loss_scores(space, {move: loss - start for move, loss in zip(variants, losses, strict=True)})
    return Selection(space.best(scores, budget), scores, trace, search.objective.cost)


def add_one(search: Search, num_questions: NumQuestions = None) -> Selection:
    """Restore one layer of the all-linear model, and keep the layers that help most.

    A score is the fall of the mean answer loss, in nats, on the first `num_questions` of the search-validation split.
    Keeps two layers that do the same thing, and sees nothing where layers help only together.

    Raises:
        UserError: see `Space.limit`.
    """
    return _score(search, "restore", num_questions)


def drop_one(search: Search, num_questions: NumQuestions = None) -> Selection:
    """Switch one layer of the full model, and keep the layers whose loss hurts most.

    A score is the rise of the mean answer loss, in nats, on the first `num_questions` of the search-validation split.
    Blind where layers are redundant: none of two that stand in for each other is missed alone.

    Raises:
        UserError: see `Space.limit`.
    """
    return _score(search, "switch", num_questions)


def nll(
    search: Search,
    direction: Direction = "restore",
    num_questions: NumQuestions = 64,
) -> Selection:
    """NLL-guided selection (arXiv 2606.27791): rank layers once by the answers' negative log-likelihood.

    `direction` is `restore` or `switch`. A score is the difference of the mean answer loss to the base, in nats; the
    paper asks 64 questions. The loss is that of every strategy here, so `restore` measures what add-one does and
    `switch` what drop-one does.

    Raises:
        UserError: see `Space.limit`.
    """
    return _score(search, direction, num_questions)


ADD_ONE = Strategy(add_one, reuse="scores")
DROP_ONE = Strategy(drop_one, reuse="scores")
NLL = Strategy(nll, reuse="scores")
