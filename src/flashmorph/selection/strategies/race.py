"""Greedy forward by racing: few questions for every candidate, more only for those that may still be the best.

In each step all candidates answer the same few questions, then twice as many, and so on. After each round those leave
whose paired difference to the best one lies above 0 with confidence, and from the second round on the worse half too;
the candidates that see the last question are compared as greedy forward compares them. (Racing with intervals: Maron
and Moore, "Hoeffding Races", NeurIPS 1993; successive halving: Jamieson and Talwalkar, arXiv 1502.07943.)
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from flashmorph.plan import Plan, Space
from flashmorph.selection.measure import first_questions
from flashmorph.selection.moves import (
    Move,
    dearer_moves,
    extra_cost,
    free_moves,
    most_moves,
    moved,
    plan_of_none,
)
from flashmorph.selection.racing import CONFIDENCE, MOST_QUESTIONS, Finish, Track
from flashmorph.selection.strategies.greedy import order_of_choice
from flashmorph.selection.strategy import NumQuestions, Search, Selection, Strategy


def race(
    search: Search,
    num_questions: NumQuestions = MOST_QUESTIONS,
    start_questions: Annotated[int, Field(ge=2, le=1_000_000)] = 8,
    confidence: Annotated[float, Field(gt=0, lt=1)] = CONFIDENCE,
    swaps: bool = True,
) -> Selection:
    """Greedy forward's plan for a fraction of its questions, forward passes only; then one-swap neighbours are tried.

    Races run over the first `num_questions` of the search-validation split, from `start_questions` on doubling. A
    candidate leaves when the paired t-interval of that `confidence` around its mean difference to the best lies above
    0: the more the candidates differ, the fewer questions it takes. With `swaps` the plan found runs once against
    those in which the last race's runner-up replaces a layer that was chosen earlier; only such an interval
    or the mean over all questions can beat it.

    A layer's score is the order of choice: K for the first, 1 for the last, 0 for a layer that was not chosen. In the
    trace, `questions` is how many stand behind a loss.

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    limit, total = space.limit(budget), most_moves(space, budget) + swaps
    questions = len(first_questions(search, num_questions))
    track = Track(search.objective, questions, start_questions, confidence)
    nothing = plan_of_none(space, budget)
    chosen: list[Move] = []
    spare: Move | None = None

    def so_far(done: int) -> Callable[[float], None]:
        return lambda share: search.report(done + share, max(total, done + 1))

    def spend() -> None:
        nonlocal spare
        while moves := dearer_moves(space, moved(nothing, *chosen), limit):
            finish = _run(track, space, moved(nothing, *chosen), moves, so_far(len(chosen)))
            chosen.append(moves[finish.winner])
            spare = None if finish.runner_up is None else moves[finish.runner_up]
            search.report(len(chosen), max(total, len(chosen) + swaps), loss=finish.loss)

    spend()
    if swaps:
        # Instead of the last one the runner-up has run already.
        replaced = range(len(chosen) - 1) if spare else ()
        choices = [chosen, *([*chosen[:index], spare, *chosen[index + 1 :]] for index in replaced)]
        choices = [moves for moves in choices if space.cost_of(moved(nothing, *moves)) <= limit]
        finish = track.run([moved(nothing, *moves) for moves in choices], defended=True, report=so_far(len(chosen)))
        chosen = choices[finish.winner]
        search.report(len(chosen) + 1, len(chosen) + 1, loss=finish.loss)
        spend()  # Where options cost differently, the swap may have saved something.
    # Races are not transitive: a plan that was beaten once does not come back, or this would not end.
    beaten: list[Plan] = []
    while True:
        plan = moved(nothing, *chosen)
        moves = [move for move in free_moves(space, plan) if moved(plan, move) not in beaten]
        if not moves:
            break
        finish = track.run([plan, *(moved(plan, move) for move in moves)], defended=True)
        if not finish.winner:
            break
        beaten.append(plan)
        chosen.append(moves[finish.winner - 1])
    return Selection(moved(nothing, *chosen), order_of_choice(space, chosen), track.trace, search.objective.cost)


def _run(track: Track, space: Space, plan: Plan, moves: list[Move], report: Callable[[float], None]) -> Finish:
    """Race moves from `plan`: by their loss or, where they cost differently, by its fall for each unit of cost."""
    extras = np.array([extra_cost(space, plan, move) for move in moves])
    plans = [moved(plan, move) for move in moves]
    if np.ptp(extras):
        return track.run(plans, base=plan, costs=extras, report=report)
    return track.run(plans, report=report)


RACE = Strategy(race, reuse="order", order_from="most", order_settings={"swaps": False})
