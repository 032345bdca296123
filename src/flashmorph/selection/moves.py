"""Moves: another option for one group. What strategies that go from plan to plan consist of."""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np

from flashmorph.plan import FULL, Budget, Group, Plan, Space


class Move(NamedTuple):
    """A group, and the option that it gets."""

    group: Group
    option: str


def plan_of_none(space: Space, budget: Budget) -> Plan:
    """Every group has its cheapest option."""
    return space.plan([], budget)


def plan_of_all(space: Space, budget: Budget) -> Plan:
    """Every group is full."""
    return space.plan(space.groups, budget)


def moved(plan: Plan, *moves: Move) -> Plan:
    """The plan after these moves."""
    for move in moves:
        plan = plan.moved(*move)
    return plan


def every_move(space: Space, plan: Plan) -> list[Move]:
    """Every group to every option that it does not have, by group, then in the order of the options."""
    return [
        Move(group, option) for group in space.groups for option in space.options if plan.assignments[group] != option
    ]


def extra_cost(space: Space, plan: Plan, move: Move) -> float:
    """What a move adds to the cost of the plan."""
    row = space.groups.index(move.group)
    before, after = (space.options.index(option) for option in (plan.assignments[move.group], move.option))
    return float(space.cost[row, after] - space.cost[row, before])


def dearer_moves(space: Space, plan: Plan, limit: float) -> list[Move]:
    """Moves that spend more and still fit into `limit`."""
    room = limit - space.cost_of(plan)
    return [move for move in every_move(space, plan) if 0 < extra_cost(space, plan, move) <= room]


def cheaper_moves(space: Space, plan: Plan) -> list[Move]:
    """Moves that save something."""
    return [move for move in every_move(space, plan) if extra_cost(space, plan, move) < 0]


def free_moves(space: Space, plan: Plan) -> list[Move]:
    """Moves between options that cost the same."""
    return [move for move in every_move(space, plan) if extra_cost(space, plan, move) == 0]


def one_swaps(space: Space, plan: Plan, limit: float) -> list[Plan]:
    """The one-swap neighbours of a plan: two groups exchange their options, or one makes a free move.

    Only those that fit into `limit` and leave no room for a dearer move: of a count of layers all of them.
    """
    own = plan.assignments
    pairs = [(one, other) for one, other in combinations(space.groups, 2) if own[one] != own[other]]
    swapped = [moved(plan, Move(one, own[other]), Move(other, own[one])) for one, other in pairs]
    found = [*swapped, *(moved(plan, move) for move in free_moves(space, plan))]
    return [each for each in found if space.cost_of(each) <= limit and not dearer_moves(space, each, limit)]


def most_moves(space: Space, budget: Budget) -> int:
    """How many groups can be made full, the cheapest ones first."""
    limit, rows = space.limit(budget), np.arange(len(space.groups))
    full, least = space.cost[:, space.options.index(FULL)], space.cost[rows, space.order[:, 1]]
    spent = least.sum() + np.cumsum(np.sort(full - least))
    return int((spent <= limit).sum())


def gain_scores(space: Space, gains: Mapping[Move, float]) -> np.ndarray:
    """Scores `[groups, options]` from what each move away from the cheapest option gains; that itself has 0."""
    scores = np.zeros(space.cost.shape)
    for (group, option), gain in gains.items():
        scores[space.groups.index(group), space.options.index(option)] = gain
    return scores


def loss_scores(space: Space, losses: Mapping[Move, float]) -> np.ndarray:
    """Scores `[groups, options]` from what each move away from `full` loses, above those of the cheapest option."""
    lost = gain_scores(space, losses)
    return np.take_along_axis(lost, space.order[:, 1:2], 1) - lost
