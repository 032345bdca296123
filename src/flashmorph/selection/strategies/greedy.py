"""Greedy: from none full restore, or from all full switch, the layer that serves best, again and again.

Conditioned on what was chosen before, forward passes only. Forward takes L + (L - 1) + ... evaluations for K layers of
L. Backward sees layers that help only together, and is the dearer one for small budgets; KL-LS calls it greedy removal
(arXiv 2512.20569, ablation).
"""

from collections.abc import Callable, Sequence

import numpy as np

from flashmorph.plan import FULL, Plan, Space
from flashmorph.selection.measure import first_questions, mean_losses
from flashmorph.selection.moves import (
    Move,
    cheaper_moves,
    dearer_moves,
    extra_cost,
    free_moves,
    most_moves,
    moved,
    plan_of_all,
    plan_of_none,
)
from flashmorph.selection.strategy import NumQuestions, Search, Selection, Strategy, group_scores


class _Climb:
    """One plan after the other, each a move away from the one before."""

    def __init__(self, search: Search, plan: Plan, num_questions: int | None, total: int):
        self.space, self.plan, self.trace, self.moves = search.space, plan, [], []
        self._search, self._questions = search, first_questions(search, num_questions)
        self._total, self._loss = total, None

    def losses(self, plans: Sequence[Plan]) -> list[float]:
        """Mean answer losses, kept in the trace."""
        total = max(self._total, len(self.trace) + len(plans))
        return mean_losses(self._search, plans, self._questions, self.trace, total)

    def step(self, candidates: Callable[[], list[Move]]) -> bool:
        """Take the move whose loss is lowest; of moves that cost differently, whose fall in loss for its cost is."""
        if not (moves := candidates()):
            return False
        extras = np.array([extra_cost(self.space, self.plan, move) for move in moves])
        before = self.loss() if np.ptp(extras) else 0.0
        losses = self.losses([moved(self.plan, move) for move in moves])
        rises = [(loss - before) / abs(extra) for loss, extra in zip(losses, extras, strict=True)]
        best = rises.index(min(rises)) if np.ptp(extras) else losses.index(min(losses))
        self._take(moves[best], losses[best])
        return True

    def improve(self) -> bool:
        """Take the best move that costs nothing, if it lowers the loss."""
        if not (moves := free_moves(self.space, self.plan)):
            return False
        before = self.loss()
        losses = self.losses([moved(self.plan, move) for move in moves])
        if min(losses) >= before:
            return False
        self._take(moves[losses.index(min(losses))], min(losses))
        return True

    def loss(self) -> float:
        """The mean answer loss of the plan so far."""
        if self._loss is None:
            (self._loss,) = self.losses([self.plan])
        return self._loss

    def _take(self, move: Move, loss: float) -> None:
        self.plan, self._loss = moved(self.plan, move), loss
        self.moves.append(move)


def greedy_forward(search: Search, num_questions: NumQuestions = None) -> Selection:
    """From no layer full, restore the one that lowers the answer loss most, again and again.

    Losses are means over the first `num_questions` of the search-validation split. A layer's score is the order of
    choice: K for the first, 1 for the last, 0 for a layer that was not chosen. Blind where layers help only together:
    the first of them gains nothing.

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    limit, kept = space.limit(budget), most_moves(space, budget)
    total = (len(space.options) - 1) * sum(len(space.groups) - number for number in range(kept))
    climb = _Climb(search, plan_of_none(space, budget), num_questions, total)
    while climb.step(lambda: dearer_moves(space, climb.plan, limit)):
        pass
    while climb.improve():
        pass
    return Selection(climb.plan, order_of_choice(space, climb.moves), climb.trace, search.objective.cost)


def order_of_choice(space: Space, moves: Sequence[Move]) -> np.ndarray:
    """Scores `[groups, options]`: K for the first of K moves, 1 for the last, 0 elsewhere."""
    scores = np.zeros(space.cost.shape)
    for number, (group, option) in enumerate(moves):
        row = space.groups.index(group)
        scores[row] = 0.0
        scores[row, space.options.index(option)] = len(moves) - number
    return scores


def greedy_backward(search: Search, num_questions: NumQuestions = None) -> Selection:
    """From every layer full, switch the one that raises the answer loss least, again and again.

    Losses are means over the first `num_questions` of the search-validation split. A layer's score is how long it
    stayed full: 0 for the one switched first, L - K for those that stay.

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    limit, layers = space.limit(budget), len(space.groups)
    total = (len(space.options) - 1) * sum(range(most_moves(space, budget) + 1, layers + 1))
    climb = _Climb(search, plan_of_all(space, budget), num_questions, total)
    while space.cost_of(climb.plan) > limit:
        climb.step(lambda: cheaper_moves(space, climb.plan))
    # Where options cost differently, the last switch may have saved more than it had to.
    while climb.step(lambda: dearer_moves(space, climb.plan, limit)):
        pass
    while climb.improve():
        pass
    left = {group: number for number, (group, _) in reversed([*enumerate(climb.moves)])}
    stayed = [float(left.get(group, len(climb.moves))) for group in space.groups]
    return Selection(climb.plan, group_scores(space, stayed, FULL), climb.trace, search.objective.cost)


GREEDY_FORWARD = Strategy(greedy_forward, reuse="order", order_from="most")
GREEDY_BACKWARD = Strategy(greedy_backward, reuse="order", order_from="least")
