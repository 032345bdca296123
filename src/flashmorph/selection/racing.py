"""Where plans race: the same questions for all, few at first, more for those that may still be the best."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.stats import t as student_t

from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.selection.measure import first_questions
from flashmorph.selection.strategy import EACH_TASK, Objective, Search, Swaps

Entrant = TypeVar("Entrant")
"""What stands for a plan in `defend`."""
START_QUESTIONS = 4
"""Of a race in which the plan so far is defended, at least. `race`, which defends none, asks more."""
PATIENCE = 2
"""So many rounds of swaps in a row that change nothing end them: the candidates of one come from one batch."""
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
        report: Callable[[float], None] = lambda share: None,
    ) -> Finish:
        """Race `plans`; a `defended` first one leaves by its interval only, never with the worse half.

        Given what each plan costs more than `base`, `costs` `[plans]`, they race by how much the loss rises above that
        of `base` for each unit of cost. `report` is called with the share of the questions that have been asked.
        """
        losses = {index: np.empty(0) for index in range(len(plans))}
        running, asked, runner_up = list(losses), 0, None
        while True:
            is_first_round = not asked
            until = min(len(self._order), max(self._start, 2 * asked))
            entrants = [*(plans[index] for index in running), *([base] if base else [])]
            before, after = asked / len(self._order), until / len(self._order)

            def so_far(share: float, before: float = before, after: float = after) -> None:
                report(before + share * (after - before))

            new = self._objective.evaluate(entrants, self._order[asked:until], so_far)
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


def improve_by_swaps(
    search: Search, scores: np.ndarray, swaps: Swaps, first_step: int, trace: list[Figures]
) -> np.ndarray:
    """Exchange the scores `[groups, options]` of two groups where that makes a better plan of them.

    In each round the gradient of the gates at the plan itself, on the search-train batch `first_step` plus the number
    of the round, orders all exchanges of a group above its cheapest option for one at it, by how much the loss falls
    to first order. The first of them race against the plan, forward passes only, and the winner becomes the plan. It
    ends with `PATIENCE` rounds in a row that changed nothing. Options must cost the same in every group.
    """
    tried: set[tuple[int, ...]] = set()

    def candidates(scores: np.ndarray, number: int) -> list[np.ndarray]:
        own = _options(search, scores)
        tried.add(tuple(own))
        exchanges = _by_gradient(search, own, first_step + number)
        choices = [(pair, _options_after(own, *pair)) for pair in exchanges]
        choices = [(pair, options) for pair, options in choices if options not in tried][: swaps.candidates]
        tried.update(options for _, options in choices)
        return [_scores_after(scores, *pair) for pair, _ in choices]

    return defend(
        search, scores, candidates, lambda table: search.space.best(table, search.budget), swaps.rounds, trace
    )


def defend(
    search: Search,
    first: Entrant,
    candidates: Callable[[Entrant, int], Sequence[Entrant]],
    plan_of: Callable[[Entrant], Plan],
    rounds: int,
    trace: list[Figures],
) -> Entrant:
    """Race `first` against the `candidates` of each round, given the winner so far and the round's number.

    The winner goes on. It ends where there are no candidates, or with `PATIENCE` rounds in a row that changed nothing.
    The losses of all races are added to `trace`.
    """
    questions, start = first_questions(search, MOST_QUESTIONS), start_questions(search.objective.num_tasks)
    winner, lost = first, 0
    for number in range(rounds):
        entrants = [winner, *candidates(winner, number)]
        if len(entrants) == 1:
            break
        track = Track(search.objective, len(questions), start, CONFIDENCE)

        def report(share: float, number: int = number) -> None:
            search.report(number + share, rounds)

        finish = track.run([plan_of(each) for each in entrants], defended=True, report=report)
        trace += track.trace
        winner = entrants[finish.winner]
        search.report(number + 1, rounds, loss=finish.loss)
        lost = 0 if finish.winner else lost + 1
        if lost == PATIENCE:
            break
    return winner


def start_questions(tasks: int) -> int:
    """Questions of the first round of a race in which the plan so far is defended: no plan leaves before each of the
    `tasks`, which take turns, was asked."""
    return math.ceil(START_QUESTIONS / tasks) * tasks


def gradient_at(search: Search, own: Sequence[int], step: int) -> torch.Tensor:
    """How much the loss rises with each gate `[groups, options]` at the plan of these options, on a training batch."""
    gates = torch.zeros(search.space.cost.shape)
    gates[range(len(own)), list(own)] = 1
    return search.objective.gradient(gates, step, "answers", EACH_TASK)[1]


def _options(search: Search, scores: np.ndarray) -> list[int]:
    """The number of the option of each group in the best plan by `scores`."""
    space = search.space
    return space.one_hot(space.best(scores, search.budget)).argmax(1).tolist()


def _by_gradient(search: Search, own: Sequence[int], step: int) -> list[tuple[int, int]]:
    """All exchanges of a group above its cheapest option for one at it, the most promising first.

    The gates' gradient says what a little of another option would change. It has the right order, not the right size.
    """
    space = search.space
    gradient = gradient_at(search, own, step)
    cheapest = space.order[:, 1].tolist()
    kept = [row for row, option in enumerate(own) if option != cheapest[row]]
    rest = [row for row, option in enumerate(own) if option == cheapest[row]]

    def change(pair: tuple[int, int]) -> float:
        out, into = pair
        fall = gradient[out, own[into]] - gradient[out, own[out]]
        return float(fall + gradient[into, own[out]] - gradient[into, own[into]])

    return sorted(((out, into) for out in kept for into in rest), key=change)


def _options_after(own: Sequence[int], one: int, other: int) -> tuple[int, ...]:
    options = list(own)
    options[one], options[other] = options[other], options[one]
    return tuple(options)


def _scores_after(scores: np.ndarray, one: int, other: int) -> np.ndarray:
    exchanged = scores.copy()
    exchanged[[one, other]] = scores[[other, one]]
    return exchanged
