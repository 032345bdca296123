"""The search for the best known plan of a budget: several starts, then a local search from the best of them."""

import logging
import random
from collections.abc import Callable
from typing import Any

from flashmorph.errors import UserError
from flashmorph.inputs.shapes import Count, Finite, Shape
from flashmorph.plan import Budget, Group, Plan, Space
from flashmorph.progress import Report, silent
from flashmorph.referee.capped import Capped, CapReached, Prices, step_price
from flashmorph.selection import STRATEGIES
from flashmorph.selection.cache import key_of
from flashmorph.selection.moves import dearer_moves, moved, one_swaps, plan_of_none
from flashmorph.selection.racing import CONFIDENCE, Track
from flashmorph.selection.search import own_settings
from flashmorph.selection.strategy import Objective, Search, State

SEARCHES = {"gates": 0.25, "race": 0.5, "greedy-forward": 0.25}
"""The strategies that it starts from, and the share of all tokens that each may take. The gates come first, since
only the first search of an objective can go on counting where it was interrupted."""
RANDOM_PLANS = 20
GREEDY_QUESTIONS = 16
"""Of `greedy-forward`, which asks all of them by default: a quarter of what the races ask."""
START_QUESTIONS = 8
"""Of a race among neighbours."""
_LOG = logging.getLogger(__name__)


class Found(Shape):
    """The best known plan of a budget, and how it was found.

    `loss` is its mean over all questions of the search in nats, `starts` that of each start; `swaps` is how often the
    local search went on to a neighbour of `came_from`, `ended` whether it ended by itself, not by the cap. `tokens`
    counts forward ones, backward ones as two.
    """

    assignments: dict[str, str]
    loss: Finite
    came_from: str
    starts: dict[str, Finite]
    left_out: list[str]
    swaps: Count
    ended: bool
    tokens: Count
    plans_judged: Count


def require_tokens(budget: Budget, questions: int, prices: Prices, most: int) -> int:
    """The tokens that comparing the starts takes, at most.

    Raises:
        UserError: that is more than `most`.
    """
    plans = RANDOM_PLANS + len(SEARCHES)
    least = plans * questions * prices.question
    if least > most:
        raise UserError(
            f"the reference of budget {budget} compares {plans} plans on {questions} questions of {prices.question:,} "
            f"tokens, {least:,} in all, and reference_tokens is {most:,}: give more, or fewer or shorter questions "
            "(select.search)"
        )
    return least


def find_best_known(
    space: Space,
    budget: Budget,
    objective: Objective,
    prices: Prices,
    most: int,
    seed: int,
    state: State | None = None,
    report: Report = silent,
    say: Callable[[str], None] = _LOG.warning,
) -> Found:
    """Search for the best plan of a budget whose plans are too many.

    The best on all questions among what `SEARCHES` find and `RANDOM_PLANS` random plans; then, as long as one wins,
    the winner of a race of its one-swap neighbours.

    Args:
        space: All plans, with their cost in the budget's resource.
        budget: How much may stay full.
        objective: Losses by questions that no strategy under comparison sees; nothing was asked of it before.
        prices: What it costs to ask.
        most: The most tokens, forward and twice backward.
        seed: Of everything random.
        state: Where the gates' descent is kept.
        report: Called with the tokens spent, and with `most`.
        say: Called where a search is left out.

    Raises:
        UserError: `most` is too little to compare the starts; or see `Space.limit`.
    """
    limit = space.limit(budget)
    kept_back = require_tokens(budget, objective.num_questions, prices, most)
    capped = Capped(objective, space, prices, most, report)
    plans: dict[str, Plan] = {}
    left_out: list[str] = []
    for name, share in SEARCHES.items():
        tokens = min(int(share * most), most - kept_back - capped.spent)
        capped.until = capped.spent + tokens
        plan = _start(name, Search(space, budget, capped, seed, say=say, state=state), prices, tokens)
        if plan is None:
            left_out.append(name)
            why = (
                f"takes more than its {tokens:,} tokens" if _serves(name, space) else "chooses between two options only"
            )
            say(f"the reference of budget {budget} starts without {name}, which {why}")
        elif plan not in plans.values():
            plans[name] = plan
    capped.until = most
    drawn = random_plans(space, budget, random.Random(f"{seed} reference {budget}"), RANDOM_PLANS)
    new = [plan for plan in drawn if plan not in plans.values()]
    plans |= {f"random plan {number}": plan for number, plan in enumerate(new, 1)}
    losses = dict(zip(plans, capped.evaluate([*plans.values()]).mean(1).tolist(), strict=True))
    first = min(losses, key=lambda name: losses[name])
    plan, loss, swaps, ended = local_optimum(space, plans[first], losses[first], limit, capped)
    return Found(
        assignments={str(group): option for group, option in plan.assignments.items()},
        loss=loss,
        came_from=first,
        starts=losses,
        left_out=left_out,
        swaps=swaps,
        ended=ended,
        tokens=capped.spent,
        plans_judged=capped.plans_judged,
    )


def local_optimum(space: Space, plan: Plan, loss: float, limit: float, capped: Capped) -> tuple[Plan, float, int, bool]:
    """From `plan` on to the winner of a race of its one-swap neighbours, until none wins or the cap is reached.

    Few questions may send a plan out of a race by mistake, so a winner must also be better on all of them. A plan that
    was beaten does not come back.

    Returns:
        The plan, its mean loss over all questions, the number of swaps, and whether it ended by itself.
    """
    track = Track(capped, capped.num_questions, START_QUESTIONS, CONFIDENCE)
    beaten: set[str] = set()
    swaps = 0
    while True:
        entrants = [plan, *(each for each in one_swaps(space, plan, limit) if key_of(each.assignments) not in beaten)]
        if len(entrants) == 1:
            return plan, loss, swaps, True
        try:
            finish = track.run(entrants, defended=True)
            if not finish.winner:
                return plan, loss, swaps, True
            winner = entrants[finish.winner]
            better = float(capped.evaluate([winner]).mean())
        except CapReached:
            return plan, loss, swaps, False
        if better < loss:
            beaten |= {key_of(each.assignments) for each in entrants if each is not winner}
            plan, loss, swaps = winner, better, swaps + 1
        else:
            # What left that race may still be better than the plan, so it runs again.
            beaten.add(key_of(winner.assignments))


def random_plans(space: Space, budget: Budget, rng: random.Random, most: int) -> list[Plan]:
    """At most `most` different plans that spend the budget, each by dearer moves at random from none full.

    Options that cost the same are drawn as well. Small spaces may have fewer plans.

    Raises:
        UserError: see `Space.limit`.
    """
    limit, found = space.limit(budget), []
    for _ in range(10 * most):
        plan = plan_of_none(space, budget)
        while moves := dearer_moves(space, plan, limit):
            plan = moved(plan, rng.choice(moves))
        own = space.one_hot(plan).argmax(1).tolist()
        alike = [
            [at for at, cost in enumerate(row) if cost == row[one]] for row, one in zip(space.cost, own, strict=True)
        ]
        plan = space.of_options([rng.choice(options) for options in alike], budget)
        if plan not in found:
            found.append(plan)
        if len(found) == most:
            break
    return found


def plan_of(found: Found, budget: Budget) -> Plan:
    """The plan that was found."""
    return Plan({Group(group): option for group, option in found.assignments.items()}, budget, "best known")


def _start(name: str, search: Search, prices: Prices, tokens: int) -> Plan | None:
    """The plan that a strategy finds for so many tokens; None where these are too few, or it knows no such options."""
    if not _serves(name, search.space):
        return None
    try:
        found = STRATEGIES[name].run(search, **own_settings(name, _cheaper(name, prices, tokens))).plan
    except CapReached:
        return None
    return Plan(found.assignments, search.budget)


def _serves(name: str, space: Space) -> bool:
    return len(space.options) == 2 or not STRATEGIES[name].two_options


def _cheaper(name: str, prices: Prices, tokens: int) -> dict[str, Any]:
    """The settings of a start that are not the strategy's own: fewer steps of the gates, fewer questions of greedy."""
    if name == "greedy-forward":
        return {"num_questions": GREEDY_QUESTIONS}
    if name == "gates":
        loss = STRATEGIES[name].gradient_loss or "answers"
        return {"steps": max(1, min(own_settings(name)["steps"], tokens // step_price(prices, loss)))}
    return {}
