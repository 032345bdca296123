"""Greedy forward by racing: few questions for every candidate, more only for those that may still be the best.

In each step all candidates answer the same few questions, then twice as many, and so on. After each round those leave
whose paired difference to the best one lies above 0 with confidence, and from the second round on the worse half too;
the candidates that see the last question are compared as greedy forward compares them. (Racing with intervals: Maron
and Moore, "Hoeffding Races", NeurIPS 1993; successive halving: Jamieson and Talwalkar, arXiv 1502.07943.)
"""

import math
from typing import Annotated

import torch
from pydantic import Field

from flashmorph.plan import FULL, Budget, Space
from flashmorph.selection.measure import count_layers, first_questions
from flashmorph.selection.racing import CONFIDENCE, MOST_QUESTIONS, Track
from flashmorph.selection.strategy import NumQuestions, Objective, Selection, group_scores


def race(
    space: Space,
    budget: Budget,
    objective: Objective,
    seed: int,
    num_questions: NumQuestions = MOST_QUESTIONS,
    start_questions: Annotated[int, Field(ge=2, le=1_000_000)] = 8,
    confidence: Annotated[float, Field(gt=0, lt=1)] = CONFIDENCE,
    swaps: bool = True,
    first_by_gradient: bool = False,
    hard_first: bool = False,
) -> Selection:
    """Greedy forward's plan for a fraction of its questions, forward passes only; then one-swap neighbours are tried.

    Races run over the first `num_questions` of the search-validation split, from `start_questions` on doubling. A
    candidate leaves when the paired t-interval of that `confidence` around its mean difference to the best lies above
    0: the more the candidates differ, the fewer questions it takes. With `swaps` the plan found runs once against
    those in which the last race's runner-up takes the place of a layer that was chosen earlier; only such an interval
    or the mean over all questions can beat it. With `first_by_gradient` only the better half of the layers runs in
    each step (always more than the budget's), in the order of the answers' loss gradient where no layer is full. With
    `hard_first` each race asks those questions first that the plan so far answers worst.

    A layer's score is the order of choice: K for the first, 1 for the last, 0 for a layer that was not chosen. In the
    trace, `questions` is how many stand behind a loss.

    Raises:
        UserError: the budget is not a count of layers or leaves no choice.
    """
    kept = count_layers(space, budget, "race")
    questions = len(first_questions(objective, num_questions))
    entrants = _by_gradient(space, budget, objective, kept) if first_by_gradient else list(space.groups)
    track = Track(objective, questions, start_questions, confidence)
    chosen: list[str] = []
    spare: str | None = None
    for place in range(kept):
        if hard_first:
            track.hardest_first(space.plan(chosen, budget))
        candidates = [group for group in entrants if group not in chosen]
        finish = track.run([space.plan([*chosen, group], budget) for group in candidates])
        chosen.append(candidates[finish.winner])
        spare = None if finish.runner_up is None else candidates[finish.runner_up]
        objective.progress(place + 1, kept + swaps, loss=finish.loss)
    if swaps:
        # In the place of the last one the runner-up has run already.
        places = range(kept - 1) if spare else ()
        choices = [chosen, *([*chosen[:place], spare, *chosen[place + 1 :]] for place in places)]
        finish = track.run([space.plan(full, budget) for full in choices], defended=True)
        chosen = choices[finish.winner]
        objective.progress(kept + 1, kept + 1, loss=finish.loss)
    order = [float(kept - chosen.index(group)) if group in chosen else 0.0 for group in space.groups]
    scores = group_scores(space, order, FULL)
    return Selection(space.best(scores, budget), scores, track.trace, objective.cost)


def _by_gradient(space: Space, budget: Budget, objective: Objective, kept: int) -> list[str]:
    """The better half of the groups, those first whose opening lowers the loss fastest where nothing is full."""
    gates = torch.tensor(space.one_hot(space.plan([], budget)), dtype=torch.float32)
    _, gradient = objective.gradient(gates, 0, "answers")
    full = space.options.index(FULL)
    slope = gradient[:, full] - gradient[:, 1 - full]
    order = torch.argsort(slope, stable=True).tolist()
    return [space.groups[place] for place in order[: max(kept + 1, math.ceil(len(order) / 2))]]
