"""The space of plans, and the best plan for given scores."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashmorph.errors import UserError, quoted
from flashmorph.plan.budget import Budget
from flashmorph.plan.group import Group
from flashmorph.plan.knapsack import knapsack
from flashmorph.plan.plan import FULL, Plan
from flashmorph.units import byte_size


@dataclass(frozen=True)
class Space:
    """All plans: `groups`, `options`, and the cost of each option of each group.

    `cost` is `[groups, options]` in the budget's resource: 1 for a full layer when layers are counted, bytes of cache
    for `kv`, microseconds for `ms`.

    Of equally good options the first counts in this order: `full`, then the cheaper one, then the one named first.
    """

    groups: tuple[Group, ...]
    options: tuple[str, ...]
    cost: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(map(Group, self.groups)))
        if self.cost.shape != (len(self.groups), len(self.options)):
            raise ValueError(
                f"cost must be [groups, options] = {(len(self.groups), len(self.options))}; got {self.cost.shape}"
            )

    @classmethod
    def of_layers(cls, num_layers: int, options: Sequence[str] = (FULL, "linear")) -> "Space":
        """One group a layer; a full layer costs 1, any other nothing."""
        cost = np.tile([float(option == FULL) for option in options], (num_layers, 1))
        return cls(tuple(Group(f"layers.{layer}") for layer in range(num_layers)), tuple(options), cost)

    @classmethod
    def of_heads(cls, num_layers: int, kv_heads: int, options: Sequence[str] = (FULL, "linear")) -> "Space":
        """One group a key-value head; a full head costs 1, any other nothing."""
        cost = np.tile([float(option == FULL) for option in options], (num_layers * kv_heads, 1))
        heads = (f"layers.{layer}.kv_heads.{head}" for layer in range(num_layers) for head in range(kv_heads))
        return cls(tuple(map(Group, heads)), tuple(options), cost)

    @property
    def order(self) -> np.ndarray:
        """The numbers of the options of each group `[groups, options]` in the order that decides between equals."""
        first = np.array([option != FULL for option in self.options])
        return np.lexsort((self.cost, np.broadcast_to(first, self.cost.shape)), axis=1)

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each layer among the groups, from the first layer on; empty for a layer without a group."""
        rows: list[list[int]] = [[] for _ in range(max(group.layer for group in self.groups) + 1)]
        for row, group in enumerate(self.groups):
            rows[group.layer].append(row)
        return tuple(map(tuple, rows))

    @cached_property
    def has_heads(self) -> bool:
        """Whether groups are smaller than layers."""
        return any(group.kv_head is not None for group in self.groups)

    @cached_property
    def costs_alike(self) -> bool:
        """Whether an option costs the same in every group."""
        return not np.ptp(self.cost, axis=0).any()

    def count(self, kept: int) -> Budget:
        """The budget that keeps so many groups full, where each costs 1."""
        return Budget("heads" if self.has_heads else "layers", kept)

    def limit(self, budget: Budget) -> float:
        """The budget as an amount of this space's cost, without what every plan takes.

        Raises:
            UserError: the budget leaves no choice (every layer, or more), buys nothing, cannot be saved by switching
                layers, or counts layers where groups are smaller.
        """
        if budget.resource == "layers" and self.has_heads:
            raise UserError(
                f"budget {budget} counts layers, and heads are chosen one by one here: give a share such as heads=25%, "
                "or kv="
            )
        if budget.counts_heads and not self.has_heads:
            raise UserError(f"budget {budget} counts heads, and whole layers are chosen here: give a count, or 25%")
        if budget.is_amount:
            self._require_savings(budget)
            limit = budget.limit - budget.base
        elif budget.is_share:
            limit = max(1, math.floor(budget.limit * len(self.groups) + 1e-9))
        else:
            limit = int(budget.limit)
        most = self.cost[:, self.options.index(FULL)].sum()
        if limit >= most:
            raise UserError(
                f"budget {budget} keeps everything full: {self._amount(limit, budget)} of "
                f"{self._amount(most, budget)}; give less, for example 25%"
            )
        return limit

    def _require_savings(self, budget: Budget) -> None:
        """Refuse an amount that switching layers does not save, or that pays for no full layer."""
        full, rest = self.order[:, 0], self.order[:, 1]
        rows = np.arange(len(self.groups))
        extra = self.cost[rows, full] - self.cost[rows, rest]
        if extra.min() <= 0:
            raise UserError(self._saves_nothing(budget, int(extra.argmin())))
        least = self.cost[rows, rest].sum()
        if budget.limit - budget.base < least + extra.min():
            taker = "a token" if budget.is_time else "the cache"
            raise UserError(
                f"budget {budget} is below one full {self._unit}: with none full {taker} takes "
                f"{_size(budget.base + least, budget)} and the smallest full {self._unit} adds "
                f"{_size(extra.min(), budget)}"
            )

    def _saves_nothing(self, budget: Budget, row: int) -> str:
        """A sentence on a group that takes no less with any other option than full."""
        full, rest = (self.cost[row, self.order[row, number]] for number in (0, 1))
        other, remedy = self.options[self.order[row, 1]], "give a longer context behind the @ or another mixer"
        if budget.is_time:
            more = f"{_size(rest - full, budget)} more than" if rest > full else "as long as"
            fault = f"after {budget.context:,} tokens a {other} {self._unit} takes {more} a full one"
            remedy = "measure or estimate a longer context or another mixer"
        else:
            fault = f"at {budget.context:,} tokens the cache of a full {self._unit} takes {_size(full, budget)}"
            fault += f" and of a {other} one {_size(rest, budget)}"
        count = "heads=25%" if self.has_heads else "25%"
        return f"budget {budget}: {fault}, so that nothing is saved; {remedy}, or give a count such as {count}"

    def worth(self, scores: np.ndarray) -> np.ndarray:
        """How much higher the score of `full` is than that of the best other option, `[groups]`.

        `scores` are `[groups, options]`.
        """
        full = self.options.index(FULL)
        return scores[:, full] - np.delete(scores, full, 1).max(1)

    def best(self, scores: np.ndarray, budget: Budget) -> Plan:
        """The plan of the largest summed score under the budget: the only function that turns scores into a plan.

        Exact: a multiple-choice knapsack (`knapsack`). A count of layers is spent exactly, bytes and time at most. Of
        plans with the same sum the first one is taken, compared group by group from the first on in `order`: the lower
        layers stay full, and the others get what `plan` gives them.

        Raises:
            UserError: see `limit`.
            ValueError: `scores` is not a finite `[groups, options]`.
        """
        scores = np.asarray(scores, dtype=float)
        if scores.shape != self.cost.shape or not np.isfinite(scores).all():
            raise ValueError(f"scores must be finite and [groups, options] = {self.cost.shape}; got {scores.shape}")
        limit, order = self.limit(budget), self.order
        sorted_scores, sorted_cost = (np.take_along_axis(values, order, 1) for values in (scores, self.cost))
        chosen = knapsack(sorted_scores, sorted_cost, limit, exact=not budget.is_amount)
        if chosen is None:
            raise UserError(f"no plan spends exactly {self._amount(limit, budget)}")
        return self.of_options(np.take_along_axis(order, np.array(chosen)[:, None], 1)[:, 0].tolist(), budget)

    def cost_of(self, plan: Plan) -> float:
        """The cost of a plan in the budget's resource."""
        return float((self.one_hot(plan) * self.cost).sum())

    def of_options(self, chosen: Sequence[int], budget: Budget) -> Plan:
        """The plan with option number `chosen[g]` for group g."""
        return Plan({group: self.options[option] for group, option in zip(self.groups, chosen, strict=True)}, budget)

    def one_hot(self, plan: Plan) -> np.ndarray:
        """The plan as gates `[groups, options]` of zeros and ones.

        Raises:
            UserError: the plan is about other groups or options.
        """
        gates = np.zeros(self.cost.shape)
        if set(plan.assignments) != set(self.groups):
            raise UserError(
                f"the plan has {len(plan.assignments)} groups ({', '.join(list(plan.assignments)[:3])}, ...) and the "
                f"model {len(self.groups)} ({', '.join(self.groups[:3])}, ...): it belongs to another model"
            )
        for index, group in enumerate(self.groups):
            option = plan.assignments[group]
            if option not in self.options:
                raise UserError(
                    f"the plan gives {group} the option {quoted(option)}; it can be {', '.join(self.options)}"
                )
            gates[index, self.options.index(option)] = 1.0
        return gates

    def plan(self, full_groups: Sequence[str], budget: Budget) -> Plan:
        """The plan that keeps `full_groups`; every other group gets its cheapest option, of equals the first.

        Raises:
            UserError: there is no such group.
        """
        unknown = [group for group in full_groups if group not in self.groups]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.groups, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"there is no {quoted(unknown[0])}; the groups are {self.groups[0]} to {self.groups[-1]}{hint}"
            )
        full, rest = self.order[:, :2].T
        kept = [group in full_groups for group in self.groups]
        return self.of_options(np.where(kept, full, rest).tolist(), budget)

    @property
    def _unit(self) -> str:
        return "head" if self.has_heads else "layer"

    def _amount(self, cost: float, budget: Budget) -> str:
        """A cost in the words of the budget, with what every plan takes."""
        if budget.is_time:
            return _size(budget.base + cost, budget)
        return f"{cost:,.0f} bytes" if budget.is_amount else f"{cost:.0f} {self._unit}s"


def _size(amount: float, budget: Budget) -> str:
    """An amount of time or cache."""
    return f"{amount / 1000:,.3f} ms" if budget.is_time else byte_size(amount)
