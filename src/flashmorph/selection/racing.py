"""Where plans race: the same questions for all, few at first, more for those that may still be the best."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.selection.measure import first_questions
from flashmorph.selection.strategy import Objective, Search

START_QUESTIONS = 6
"""Of a race in which the plan so far is defended. `race`, which defends none, asks more."""
MOST_QUESTIONS = 64
CONFIDENCE = 0.8
"""Small, since what leaves a race by mistake is nearly as good as what stays (docs/decisions/0020)."""


class Finish(NamedTuple):
    """The result of a race: index and mean loss in nats of the winner, and the index of the last plan that it beat."""

    winner: int
    loss: float
    runner_up: int | None


class Track:
    """Where plans race: the same questions and the same rule for every race."""

    def __init__(self, objective: Objective, questions: int, start: int, confidence: float):
        self.trace: list[dict] = []
        self._objective, self._order, self._start = objective, list(range(questions)), start
        self._confidence = confidence

    def run(
        self,
        plans: Sequence[Plan],
        defended: bool = False,
        base: Plan | None = None,
        costs: np.ndarray | None = None,
    ) -> Finish:
        """Race `plans`; a `defended` first one leaves by its interval only, never with the worse half.

        Given what each plan costs more than `base`, `costs` `[plans]`, they race by how much the loss rises above that
        of `base` for each unit of cost.
        """
        losses = {index: np.empty(0) for index in range(len(plans))}
        running, asked, runner_up = list(losses), 0, None
        while True:
            is_first_round = not asked
            until = min(len(self._order), max(self._start, 2 * asked))
            entrants = [*(plans[index] for index in running), *([base] if base else [])]
            new = self._objective.evaluate(entrants, self._order[asked:until])
            for index, more in zip(running, new, strict=False):
                share = more if base is None or costs is None else (more - new[-1]) / costs[index]
                losses[index] = np.concatenate([losses[index], share])
                mean = float(losses[index].mean())
                entry = {"assignments": plans[index].assignments, "loss": mean, "questions": until}
                self.trace.append(entry)
            asked = until
            running.sort(key=lambda index: losses[index].mean())
            best, *rest = running
            runner_up = rest[0] if rest else runner_up
            if asked < len(self._order):
                half = len(running) if is_first_round else max(2, math.ceil(len(running) / 2))
                stay = set(running[:half]) | ({0} if defended else set())
                rest = [
                    index
                    for index in rest
                    if index in stay and margin(losses[index] - losses[best], self._confidence) >= 0
                ]
            if not rest or asked == len(self._order):
                return Finish(best, float(losses[best].mean()), runner_up)
            running = [best, *rest]


def margin(differences: np.ndarray, confidence: float) -> float:
    """How far the two-sided t-interval of the mean of `differences` reaches below 0; negative where it lies above."""
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    quantile = student_t.ppf((1 + confidence) / 2, len(differences) - 1)
    return float(quantile * error - differences.mean())


def improve_by_swaps(search: Search, scores: np.ndarray, layers: int, trace: list[Figures]) -> np.ndarray:
    """Exchange the scores `[groups, options]` of two layers where that makes a better plan of them.

    For each of the `layers` lowest-scored layers among those above their cheapest option, the weakest first, the plan
    races against all plans with another layer instead, forward passes only; the winner replaces it. Options must cost
    the same in every layer.
    """
    space, budget = search.space, search.budget
    questions = first_questions(search, MOST_QUESTIONS)
    order, rows = space.order, np.arange(len(space.groups))
    own = space.one_hot(space.best(scores, budget)).argmax(1)
    worth = scores[rows, own] - scores[rows, order[:, 1]]
    kept = [row for row in rows.tolist() if own[row] != order[row, 1]]
    weakest = sorted(kept, key=lambda row: worth[row])[:layers]
    for number, out in enumerate(weakest, 1):
        own = space.one_hot(space.best(scores, budget)).argmax(1)
        others = [row for row in rows.tolist() if own[row] == order[row, 1]]
        choices = [scores, *(_exchange(scores, out, into) for into in others)]
        track = Track(search.objective, len(questions), START_QUESTIONS, CONFIDENCE)
        finish = track.run([space.best(choice, budget) for choice in choices], defended=True)
        trace += track.trace
        scores = choices[finish.winner]
        search.report(number, len(weakest), loss=finish.loss)
    return scores


def _exchange(scores: np.ndarray, one: int, other: int) -> np.ndarray:
    exchanged = scores.copy()
    exchanged[[one, other]] = scores[[other, one]]
    return exchanged
