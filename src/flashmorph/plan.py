"""What is chosen: the space of choices, the budget, and the plan that results.

A choice is one option (`full`, `linear`, ...) for each group (today one group a layer). Everything that discretises
goes through `Space.best`, so every strategy spends a budget in the same way.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashmorph.errors import UserError
from flashmorph.files import read_json, write_json

FULL = "full"
PLAN_VERSION = 1
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMS = "7 (layers), 25% (of the layers), kv=64MiB@32768 (cache of one sequence of that many tokens) or loss=1%"


@dataclass(frozen=True)
class Budget:
    """A resource and how much of it a plan may spend.

    `resource` is `layers` (a count, spent exactly), `share` (a share of the layers, rounded down, at least one),
    `kv` (bytes of cache at `context` tokens, at most) or `loss` (added loss as a share; for `tolerance` only).
    """

    resource: str
    limit: float
    context: int | None = None

    @classmethod
    def parse(cls, text: str | int) -> "Budget":
        """Read `7`, `25%`, `kv=64MiB@32768` or `loss=1%`.

        Raises:
            UserError: the text has none of these forms, or the limit is not above 0.
        """
        text = str(text).strip()
        if match := re.fullmatch(r"(\d+)", text):
            budget = cls("layers", int(match[1]))
        elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            budget = cls("share", float(match[1]) / 100)
        elif match := re.fullmatch(r"kv=(\d+(?:\.\d+)?)([KMG]i?B|B)@(\d+)", text):
            budget = cls("kv", float(match[1]) * _BYTES[match[2]], int(match[3]))
        elif match := re.fullmatch(r"loss=(\d+(?:\.\d+)?)%", text):
            budget = cls("loss", float(match[1]) / 100)
        else:
            raise UserError(f"budget {text!r} is none of {_FORMS}")
        if budget.limit <= 0:
            raise UserError(f"budget {text!r} keeps nothing; it must be above 0, for example 25%")
        return budget

    def __str__(self) -> str:
        if self.resource == "layers":
            return str(int(self.limit))
        if self.resource == "kv":
            return f"kv={_decimal(self.limit)}B@{self.context}"
        percent = f"{_decimal(100 * self.limit)}%"
        return percent if self.resource == "share" else f"loss={percent}"


def _decimal(value: float) -> str:
    """All digits that matter, without an exponent: `Budget.parse` reads them again."""
    return np.format_float_positional(round(value, 12), trim="-")


@dataclass(frozen=True)
class Space:
    """All plans: `groups` (named by address, `layers.3`), `options`, and what each option of each group costs.

    `cost` is `[groups, options]` in the budget's resource: 1 for a full layer when layers are counted, bytes of cache
    for `kv`.
    """

    groups: tuple[str, ...]
    options: tuple[str, ...]
    cost: np.ndarray

    def __post_init__(self) -> None:
        if self.cost.shape != (len(self.groups), len(self.options)):
            raise ValueError(
                f"cost must be [groups, options] = {(len(self.groups), len(self.options))}; got {self.cost.shape}"
            )

    @classmethod
    def of_layers(cls, num_layers: int, options: Sequence[str] = (FULL, "linear")) -> "Space":
        """One group a layer; a full layer costs 1, any other nothing."""
        cost = np.tile([float(option == FULL) for option in options], (num_layers, 1))
        return cls(tuple(f"layers.{layer}" for layer in range(num_layers)), tuple(options), cost)

    def limit(self, budget: Budget) -> float:
        """The budget as an amount of this space's cost.

        Raises:
            UserError: the budget leaves no choice (every layer, or more), buys nothing, or has no cost limit.
        """
        least, most = self.cost.min(1).sum(), self.cost.max(1).sum()
        if budget.resource == "loss":
            raise UserError(f"budget {budget} limits a loss, which only the strategy `tolerance` can follow")
        if budget.resource == "kv":
            if budget.limit < least + (self.cost.max(1) - self.cost.min(1)).min():
                raise UserError(
                    f"budget {budget} is below one full layer: all layers linear take {least:,.0f} bytes and the "
                    f"smallest full layer adds {(self.cost.max(1) - self.cost.min(1)).min():,.0f}"
                )
            limit = budget.limit
        elif budget.resource == "share":
            limit = max(1, math.floor(budget.limit * len(self.groups) + 1e-9))
        else:
            limit = int(budget.limit)
        if limit >= most:
            raise UserError(
                f"budget {budget} keeps everything full: {self._amount(limit)} of {self._amount(most)}; "
                "give less, for example 25%"
            )
        return limit

    def best(self, scores: np.ndarray, budget: Budget) -> "Plan":
        """The plan of the largest summed score under the budget: the only place where scores become a plan.

        Exact: a multiple-choice knapsack (`_knapsack`), and top-K (ties to the lower layer) where there are two options
        at the same cost everywhere. A count of layers is spent exactly, bytes at most.

        Raises:
            UserError: see `limit`.
            ValueError: `scores` is not a finite `[groups, options]`.
        """
        scores = np.asarray(scores, dtype=float)
        if scores.shape != self.cost.shape or not np.isfinite(scores).all():
            raise ValueError(f"scores must be finite and [groups, options] = {self.cost.shape}; got {scores.shape}")
        limit = self.limit(budget)
        exact = budget.resource in ("layers", "share")
        extra = self.cost[:, 0] - self.cost[:, 1]
        if len(self.options) == 2 and extra[0] > 0 and (extra == extra[0]).all():
            kept = int((limit - self.cost[:, 1].sum()) // extra[0])
            order = np.argsort(scores[:, 1] - scores[:, 0], kind="stable")
            first = set(order[:kept] if exact else [g for g in order[:kept] if scores[g, 0] >= scores[g, 1]])
            return self._plan([0 if group in first else 1 for group in range(len(self.groups))], budget)
        chosen = _knapsack(scores, self.cost, limit, exact)
        if chosen is None:
            raise UserError(f"no plan spends exactly {self._amount(limit)}")
        return self._plan(chosen, budget)

    def _plan(self, chosen: Sequence[int], budget: Budget) -> "Plan":
        """The plan with option number `chosen[g]` for group g."""
        return Plan({group: self.options[option] for group, option in zip(self.groups, chosen, strict=True)}, budget)

    def one_hot(self, plan: "Plan") -> np.ndarray:
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
        for place, group in enumerate(self.groups):
            option = plan.assignments[group]
            if option not in self.options:
                raise UserError(f"the plan gives {group} the option {option!r}; it can be {', '.join(self.options)}")
            gates[place, self.options.index(option)] = 1.0
        return gates

    def plan(self, full_groups: Sequence[str], budget: Budget, other: str | None = None) -> "Plan":
        """The plan that keeps `full_groups` and gives every other group the option `other` (the last by default)."""
        other = other or self.options[-1]
        unknown = [group for group in full_groups if group not in self.groups]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.groups, 1) or [self.groups[-1]]
            raise UserError(f"there is no {unknown[0]}; the groups are {self.groups[0]} to {near[0]}")
        return Plan({group: FULL if group in full_groups else other for group in self.groups}, budget)

    def _amount(self, cost: float) -> str:
        counted = set(np.unique(self.cost)) <= {0.0, 1.0}
        return f"{cost:.0f} layers" if counted else f"{cost:,.0f} bytes"


def _knapsack(scores: np.ndarray, cost: np.ndarray, limit: float, exact: bool) -> list[int] | None:
    """One option a row, with the largest summed score at a cost of `limit` (or at most `limit`); None: there is none.

    Row by row, all partial plans are kept for which no other is both cheaper and better. Ties go to what has more of
    the first options in the lower rows.
    """
    totals, values, kept = np.zeros(1), np.zeros(1), []
    cheapest = np.append(np.cumsum(cost.min(1)[::-1])[::-1][1:], 0.0)
    for row in range(len(cost)):
        total, value = (totals[:, None] + cost[row]).ravel(), (values[:, None] + scores[row]).ravel()
        fits = np.flatnonzero(total + cheapest[row] <= limit)
        fits = fits[np.lexsort((fits, -value[fits], total[fits]))]
        if exact:
            keep = np.append(True, np.diff(total[fits]) > 0)
        else:
            keep = np.append(True, value[fits][1:] > np.maximum.accumulate(value[fits])[:-1])
        kept.append(fits[keep[: len(fits)]])
        totals, values = total[kept[-1]], value[kept[-1]]
    allowed = np.flatnonzero(totals == limit) if exact else np.arange(len(totals))
    if not len(allowed):
        return None
    place, chosen = allowed[values[allowed].argmax()], []
    for fits in reversed(kept):
        place, option = divmod(fits[place], cost.shape[1])
        chosen.append(int(option))
    return chosen[::-1]


@dataclass(frozen=True)
class Plan:
    """Which option each group gets, and where the choice came from.

    `teacher` and `revision` name the model it was chosen for; `scores` is what the strategy ranked by,
    `[groups, options]` as nested lists, for the record.
    """

    assignments: dict[str, str]
    budget: Budget
    strategy: str = "by hand"
    seed: int = 0
    teacher: str = ""
    revision: str = ""
    scores: list[list[float]] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "assignments", dict(sorted(self.assignments.items(), key=lambda item: _place(item[0])))
        )

    @property
    def full_groups(self) -> list[str]:
        """The groups that keep full attention, in order."""
        return [group for group, option in self.assignments.items() if option == FULL]

    @property
    def full_layers(self) -> list[int]:
        """Their layer numbers, in order."""
        return [int(group.split(".")[1]) for group in self.full_groups]

    def strip(self) -> str:
        """The plan as a strip of layers: ■ full, □ anything else."""
        return "".join("■" if option == FULL else "□" for option in self.assignments.values())

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON with a version number."""
        write_json(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "version": PLAN_VERSION,
            "assignments": self.assignments,
            "budget": str(self.budget),
            "strategy": self.strategy,
            "seed": self.seed,
            "teacher": self.teacher,
            "revision": self.revision,
            "scores": self.scores,
        }

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Read a plan.

        Raises:
            UserError: no such file, no JSON, a newer version, or something else than a plan.
        """
        data = read_json(Path(path))
        if not isinstance(data, dict) or not isinstance(data.get("assignments"), dict):
            raise UserError(f'{path} is no plan: it needs "assignments", a mapping of layers to options')
        if data.get("version") != PLAN_VERSION:
            raise UserError(f"{path} has plan version {data.get('version')}; this flashmorph reads {PLAN_VERSION}")
        try:
            return cls(
                assignments={str(group): str(option) for group, option in data["assignments"].items()},
                budget=Budget.parse(data["budget"]),
                **{name: data[name] for name in ("strategy", "seed", "teacher", "revision", "scores") if name in data},
            )
        except KeyError as error:
            raise UserError(f"{path} is no plan: it lacks {error}") from error


def _place(group: str) -> list[tuple[int, str]]:
    """Sorts addresses by their numbers: `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in group.split(".")]
