"""Where plans race: the same questions for all, few at first, more for those that may still be the best."""

import math

import numpy as np
from scipy.stats import t as student_t

from flashmorph.plan import Budget, Plan, Space
from flashmorph.selection.measure import first_questions
from flashmorph.selection.strategy import Objective

START_QUESTIONS = 8
CONFIDENCE = 0.95
_SURE = 0.99
"""A plan that a search has found is only given up for another with this confidence: many others are tried."""


class Track:
    """Where plans race: the same questions and the same rule for every race."""

    def __init__(self, objective: Objective, questions: int, start: int, confidence: float, indifference: float):
        self.trace: list[dict] = []
        self._objective, self._order, self._start = objective, list(range(questions)), start
        self._confidence, self._indifference = confidence, indifference

    def hardest_first(self, plan: Plan) -> None:
        """Ask from now on those questions first whose answers have the largest loss under `plan`."""
        numbers = sorted(self._order)
        (losses,) = self._objective.evaluate([plan], numbers)
        self._order = [numbers[place] for place in np.argsort(-losses, kind="stable")]

    def run(self, plans: list[Plan], defended: bool = False) -> tuple[int, float]:
        """The place of the winner and its mean loss in nats.

        A `defended` first plan leaves by its interval only, never with the worse half.
        """
        losses = {place: np.empty(0) for place in range(len(plans))}
        running, asked = list(losses), 0
        while True:
            is_first_round = not asked
            until = min(len(self._order), max(self._start, 2 * asked))
            new = self._objective.evaluate([plans[place] for place in running], self._order[asked:until])
            for place, more in zip(running, new, strict=True):
                losses[place] = np.concatenate([losses[place], more])
                mean = float(losses[place].mean())
                self.trace.append({"full": plans[place].full_groups, "loss": mean, "questions": until})
            asked = until
            running.sort(key=lambda place: losses[place].mean())
            best, *rest = running
            if asked < len(self._order):
                half = len(running) if is_first_round else max(2, math.ceil(len(running) / 2))
                stay = set(running[:half]) | ({0} if defended else set())
                rest = [place for place in rest if place in stay]
                margins = {place: margin(losses[place] - losses[best], self._confidence) for place in rest}
                # What may be better by this much at most, as the interval says: below 0, it is worse.
                rest = [place for place in rest if margins[place] >= 0]
                if all(margins[place] < self._indifference for place in rest):
                    rest = []
            if not rest or asked == len(self._order):
                return best, float(losses[best].mean())
            running = [best, *rest]


def margin(differences: np.ndarray, confidence: float) -> float:
    """How far the two-sided t-interval of the mean of `differences` reaches below 0; negative where it lies above."""
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    quantile = student_t.ppf((1 + confidence) / 2, len(differences) - 1)
    return float(quantile * error - differences.mean())


def improve_by_swaps(
    space: Space, budget: Budget, objective: Objective, scores: np.ndarray, tries: int, trace: list[dict]
) -> np.ndarray:
    """Exchange the scores `[groups, options]` of two layers as long as that makes a better plan of them.

    The `tries` exchanges of a full layer for another whose scores lie nearest race against the plan, forward passes
    only; the winner takes its place where it is better with 99 % confidence, and the next race begins.
    """
    questions = first_questions(objective, None)
    worth = scores[:, 0] - scores[:, 1]
    for _ in range(len(space.best(scores, budget).full_groups)):
        plan = space.best(scores, budget)
        full = [space.groups.index(group) for group in plan.full_groups]
        others = [place for place in range(len(space.groups)) if place not in full]
        pairs = sorted(
            ((out, into) for out in full for into in others), key=lambda pair: worth[pair[0]] - worth[pair[1]]
        )
        exchanged = [_exchange(scores, *pair) for pair in pairs[:tries]]
        plans = [plan, *(space.best(each, budget) for each in exchanged)]
        track = Track(objective, len(questions), START_QUESTIONS, CONFIDENCE, indifference=0.0)
        winner, _ = track.run(plans, defended=True)
        trace += track.trace
        if not winner:
            break
        mine, other = objective.evaluate([plan, plans[winner]], questions)
        if margin(mine - other, _SURE) >= 0:
            break
        scores = exchanged[winner - 1]
        worth = scores[:, 0] - scores[:, 1]
    return scores


def _exchange(scores: np.ndarray, one: int, other: int) -> np.ndarray:
    exchanged = scores.copy()
    exchanged[[one, other]] = scores[[other, one]]
    return exchanged
