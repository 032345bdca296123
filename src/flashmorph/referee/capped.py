"""An objective that stops before it spends more tokens than it may."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from flashmorph.plan import Plan, Space
from flashmorph.progress import Report, silent
from flashmorph.selection.cache import key_of
from flashmorph.selection.strategy import Cost, Distilled, Objective

BACKWARD = 2
"""A token backward in tokens forward."""


class CapReached(Exception):
    """What was asked for next would cost more than is left."""


class Prices(NamedTuple):
    """Tokens of one question, and of the batch of one gradient."""

    question: int
    step: int


class Capped:
    """An `Objective` that raises `CapReached` in place of an answer that could take `spent` above `until`.

    Tokens are those that the objective behind it counts, a token backward as two: what is read from disk costs the
    same, so an interrupted search stops where the whole one does. `price` counts as that does (`selection/ledger.py`),
    but before anything is run.
    """

    def __init__(self, objective: Objective, space: Space, prices: Prices, most: int, report: Report = silent):
        """At most `most` tokens, and `until` so many until it is set anew; `report` takes the tokens spent."""
        self._objective, self._space, self._prices = objective, space, prices
        self._most, self._report = most, report
        self.until = most
        self.num_questions, self.num_tasks = objective.num_questions, objective.num_tasks
        self._asked: set[tuple[str, int]] = set()

    @property
    def cost(self) -> Cost:
        """What was spent so far."""
        return self._objective.cost

    @property
    def spent(self) -> int:
        """The same as tokens forward."""
        return self.cost.tokens_forward + BACKWARD * self.cost.tokens_backward

    def evaluate(
        self,
        plans: Sequence[Plan],
        questions: Sequence[int] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Mean answer cross-entropy `[plans, questions]`; see `Objective`.

        Raises:
            CapReached: nothing was evaluated.
        """
        wanted = range(self.num_questions) if questions is None else questions
        self._allow(self.price(plans, wanted))
        losses = self._objective.evaluate(plans, questions, report)
        self._asked.update((key_of(plan.assignments), question) for plan in plans for question in wanted)
        self._report(self.spent, self._most)
        return losses

    def gradient(
        self, gates: torch.Tensor, step: int, loss: str, data: str = "questions"
    ) -> tuple[float, torch.Tensor]:
        """Loss and gradient of gates; see `Objective`.

        Raises:
            CapReached: nothing was run.
        """
        self._allow(step_price(self._prices, loss))
        found = self._objective.gradient(gates, step, loss, data)
        self._report(self.spent, self._most)
        return found

    def price(self, plans: Sequence[Plan], questions: Sequence[int]) -> int:
        """The tokens that `plans` take on `questions` that they were not asked before.

        What plans share from the first layer up runs once.
        """
        keys = [key_of(plan.assignments) for plan in plans]
        unasked = Counter(
            tuple(index for index, key in enumerate(keys) if (key, question) not in self._asked)
            for question in questions
        )
        layers = [rows[-1] + 1 for rows in self._space.layers if rows]
        chosen = [tuple(plan.assignments[group] for group in self._space.groups) for plan in plans]
        tokens = 0
        for some, number in unasked.items():
            runs = len({chosen[index][:until] for index in some for until in layers})
            tokens += -(-number * self._prices.question * runs // len(layers))
        return tokens

    @property
    def plans_judged(self) -> int:
        """How many plans were evaluated, on one question at least."""
        return len({key for key, _ in self._asked})

    def text_losses(self, plans: Sequence[Plan], report: Callable[[float], None] | None = None) -> list[float]:
        """Not offered: a reference is chosen by questions."""
        raise ValueError("a reference is chosen by questions, not by text")

    def effects(
        self, groups: int, pairs: int, kind: Literal["receiver", "sender"], receivers: Sequence[int], report: Report
    ) -> np.ndarray:
        """Not offered: no strategy that patches is one of a reference's."""
        raise ValueError("a reference is chosen by questions, not by patching")

    def distill(self, path: Sequence[Plan], steps: int, answers: bool = False) -> Distilled:
        """Not offered: a reference is chosen before any distillation."""
        raise ValueError("a reference is chosen before any distillation")

    def resume(self, cost: Cost) -> None:
        """Go on counting from the cost of an interrupted search."""
        self._objective.resume(cost)

    def _allow(self, price: int) -> None:
        if self.spent + price > self.until:
            raise CapReached


def step_price(prices: Prices, loss: str) -> int:
    """The tokens of one gradient: forward and backward and, for the published distance, the teacher's forward."""
    return (1 + BACKWARD + (loss == "hidden")) * prices.step
