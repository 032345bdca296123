"""Where a budget can be spent in more ways than by exchanging two groups: bytes, and more than two options."""

import itertools

import numpy as np

from flashmorph.plan import FULL, Plan, Space
from flashmorph.records import Figures
from flashmorph.selection.racing import defend, gradient_at
from flashmorph.selection.strategy import Search, Swaps


def improve_by_respending(search: Search, plan: Plan, swaps: Swaps, first_step: int, trace: list[Figures]) -> Plan:
    """Race a plan against others that spend its budget otherwise, round by round.

    A candidate gives one group another option. If the plan then costs too much, groups take cheaper options, those
    first for which the loss rises least for each unit of cost; what is left over goes to dearer ones for which it falls
    most. Rises and falls are those of the gates' gradient at the plan, on the search-train batch `first_step` plus the
    number of the round. It does not know what a full group is worth beside the one that becomes full, so there is a
    second candidate, for which no full group pays. The candidates whose loss should fall most race against the plan,
    forward passes only, and the winner becomes the plan. It ends with `PATIENCE` rounds in a row that changed nothing.
    """
    space, budget = search.space, search.budget
    limit, first = space.limit(budget), tuple(space.one_hot(plan).argmax(1).tolist())
    tried = {first}

    def candidates(own: tuple[int, ...], number: int) -> list[tuple[int, ...]]:
        gradient = gradient_at(search, own, first_step + number).double().numpy()
        full = np.array(own) == space.options.index(FULL)
        moves = [(group, option) for group, option in np.ndindex(*space.cost.shape) if option != own[group]]
        rises = {}
        for (group, option), spared in itertools.product(moves, (np.zeros_like(full), full)):
            options = respent(space, own, group, option, gradient, limit, spared)
            if options is not None and options not in tried:
                rises[options] = _rise(gradient, own, options)
        choices = sorted(rises, key=rises.__getitem__)[: swaps.candidates]
        tried.update(choices)
        return choices

    return space.of_options(
        defend(search, first, candidates, lambda own: space.of_options(own, budget), swaps.rounds, trace), budget
    )


def respent(
    space: Space,
    own: tuple[int, ...],
    group: int,
    option: int,
    gradient: np.ndarray,
    limit: float,
    spared: np.ndarray,
) -> tuple[int, ...] | None:
    """The options of a plan after `group` took `option`, within `limit`; None where that cannot be paid.

    `gradient` `[groups, options]` is how much the loss rises with each gate; groups that are `spared` `[groups]` keep
    their options.
    """
    options, rows = np.array(own), np.arange(len(own))
    options[group] = option
    others = ((rows != group) & ~spared)[:, None]

    def extra(values: np.ndarray) -> np.ndarray:
        return values - values[rows, options][:, None]

    while (over := space.cost[rows, options].sum() - limit) > 0:
        saved = -extra(space.cost)
        if not (allowed := others & (saved > 0)).any():
            return None
        # What saves more than is needed is worth no more for it.
        price = extra(gradient) / np.where(allowed, np.minimum(saved, over), 1.0)
        row, cheaper = np.unravel_index(np.where(allowed, price, np.inf).argmin(), price.shape)
        options[row] = cheaper
    while True:
        fits = others & (extra(space.cost) <= limit - space.cost[rows, options].sum()) & (extra(gradient) < 0)
        # An option that costs nothing more and less than nothing is another candidate's first step.
        fits &= extra(space.cost) > 0
        if not fits.any():
            return tuple(options.tolist())
        row, dearer = np.unravel_index(np.where(fits, extra(gradient), np.inf).argmin(), fits.shape)
        options[row] = dearer


def _rise(gradient: np.ndarray, own: tuple[int, ...], options: tuple[int, ...]) -> float:
    """By how much the loss rises to first order."""
    rows = range(len(own))
    return float((gradient[rows, list(options)] - gradient[rows, list(own)]).sum())
