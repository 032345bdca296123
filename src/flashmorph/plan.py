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
from typing import Annotated, Any

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from flashmorph.errors import UserError, quoted
from flashmorph.files import read_json, write_json
from flashmorph.inputs.shapes import Count, Finite, Shape, misfit

FULL = "full"
PLAN_VERSION = 1
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LONGEST = 60
_MOST_GROUPS = 100_000
_Word = Annotated[str, StringConstraints(max_length=_LONGEST)]
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
        if len(text) > _LONGEST:
            raise UserError(f"budget {quoted(text)} is none of {_FORMS}")
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

    Wherever options are equally good, one order decides: `full`, then the cheaper one, then the one named first.
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

    @property
    def order(self) -> np.ndarray:
        """The numbers of the options of each group `[groups, options]` in the order that decides between equals."""
        first = np.array([option != FULL for option in self.options])
        return np.lexsort((self.cost, np.broadcast_to(first, self.cost.shape)), axis=1)

    def limit(self, budget: Budget) -> float:
        """The budget as an amount of this space's cost.

        Raises:
            UserError: the budget leaves no choice (every layer, or more), buys nothing, cannot be saved by switching
                layers, or has no cost limit.
        """
        if budget.resource == "loss":
            raise UserError(f"budget {budget} limits a loss, which only the strategy `tolerance` can follow")
        if budget.resource == "kv":
            self._require_bytes(budget)
            limit = budget.limit
        elif budget.resource == "share":
            limit = max(1, math.floor(budget.limit * len(self.groups) + 1e-9))
        else:
            limit = int(budget.limit)
        most = self.cost[:, self.options.index(FULL)].sum()
        if limit >= most:
            raise UserError(
                f"budget {budget} keeps everything full: {self._amount(limit)} of {self._amount(most)}; "
                "give less, for example 25%"
            )
        return limit

    def _require_bytes(self, budget: Budget) -> None:
        """Refuse bytes of cache that switching layers does not save, or that pay for no full layer."""
        full, rest = self.order[:, 0], self.order[:, 1]
        rows = np.arange(len(self.groups))
        extra = self.cost[rows, full] - self.cost[rows, rest]
        if extra.min() <= 0:
            row = int(extra.argmin())
            raise UserError(
                f"budget {budget}: at {budget.context:,} tokens the cache of a full layer takes "
                f"{self.cost[row, full[row]]:,.0f} bytes and of a {self.options[rest[row]]} one "
                f"{self.cost[row, rest[row]]:,.0f}, so that nothing is saved; give a longer context behind the @, or "
                "a count such as 25%"
            )
        least = self.cost[rows, rest].sum()
        if budget.limit < least + extra.min():
            raise UserError(
                f"budget {budget} is below one full layer: with none full the cache takes {least:,.0f} bytes and the "
                f"smallest full layer adds {extra.min():,.0f}"
            )

    def best(self, scores: np.ndarray, budget: Budget) -> "Plan":
        """The plan of the largest summed score under the budget: the only place where scores become a plan.

        Exact: a multiple-choice knapsack (`_knapsack`). A count of layers is spent exactly, bytes at most. Of plans
        with the same sum the first one is taken, compared group by group from the first on in `order`: the lower layers
        stay full, and the others get what `plan` gives them.

        Raises:
            UserError: see `limit`.
            ValueError: `scores` is not a finite `[groups, options]`.
        """
        scores = np.asarray(scores, dtype=float)
        if scores.shape != self.cost.shape or not np.isfinite(scores).all():
            raise ValueError(f"scores must be finite and [groups, options] = {self.cost.shape}; got {scores.shape}")
        limit, order = self.limit(budget), self.order
        sorted_scores, sorted_cost = (np.take_along_axis(values, order, 1) for values in (scores, self.cost))
        chosen = _knapsack(sorted_scores, sorted_cost, limit, exact=budget.resource in ("layers", "share"))
        if chosen is None:
            raise UserError(f"no plan spends exactly {self._amount(limit)}")
        return self._plan(np.take_along_axis(order, np.array(chosen)[:, None], 1)[:, 0].tolist(), budget)

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
                raise UserError(
                    f"the plan gives {group} the option {quoted(option)}; it can be {', '.join(self.options)}"
                )
            gates[place, self.options.index(option)] = 1.0
        return gates

    def plan(self, full_groups: Sequence[str], budget: Budget) -> "Plan":
        """The plan that keeps `full_groups`; every other group gets its cheapest option, of equals the first.

        Raises:
            UserError: there is no such group.
        """
        unknown = [group for group in full_groups if group not in self.groups]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.groups, 1) or [self.groups[-1]]
            raise UserError(f"there is no {unknown[0]}; the groups are {self.groups[0]} to {near[0]}")
        full, rest = self.order[:, :2].T
        kept = [group in full_groups for group in self.groups]
        return self._plan(np.where(kept, full, rest).tolist(), budget)

    def _amount(self, cost: float) -> str:
        counted = set(np.unique(self.cost)) <= {0.0, 1.0}
        return f"{cost:.0f} layers" if counted else f"{cost:,.0f} bytes"


def _knapsack(scores: np.ndarray, cost: np.ndarray, limit: float, exact: bool) -> list[int] | None:
    """One option a row, with the largest summed score at a cost of `limit` (or at most `limit`); None: there is none.

    Row by row from the last one up, all partial plans are kept for which no other costs as little and comes before it:
    by its sum or, of equal sums, by the first option of the first row in which the two differ.
    """
    values = _summable(scores)
    totals, sums, rank = np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    kept: list[np.ndarray] = []
    cheapest = np.append(0.0, np.cumsum(cost.min(1))[:-1])
    for row in reversed(range(len(cost))):
        # Option by option, so that where plans stand is how they compare by their options.
        total, value = (totals + cost[row][:, None]).ravel(), (sums + values[row][:, None]).ravel()
        place = (np.arange(cost.shape[1])[:, None] * len(rank) + rank).ravel()
        fits = np.flatnonzero(total + cheapest[row] <= limit)
        fits = fits[np.lexsort((place[fits], -value[fits]))]
        # From here on `fits` is in order of preference; sorted by cost, a number is how many are preferred.
        by_cost = np.argsort(total[fits], kind="stable")
        if exact:
            keep = np.append(True, np.diff(total[fits][by_cost]) > 0)
        else:
            keep = np.append(True, by_cost[1:] < np.minimum.accumulate(by_cost)[:-1])
        fits = fits[by_cost[keep[: len(by_cost)]]]
        kept.append(fits)
        totals, sums = total[fits], value[fits]
        rank = np.argsort(np.argsort(place[fits]))
    allowed = np.flatnonzero(totals == limit) if exact else np.arange(len(totals))
    if not len(allowed):
        return None
    state, chosen = allowed[np.lexsort((rank[allowed], -sums[allowed]))[0]], []
    for row, fits in enumerate(reversed(kept)):
        states = len(kept[-row - 2]) if row + 1 < len(kept) else 1
        option, state = divmod(fits[state], states)
        chosen.append(int(option))
    return chosen


def _summable(scores: np.ndarray) -> np.ndarray:
    """Scores as whole numbers of one small power of two, whose sums are exact: equal plans come out equal.

    What rounding changes is less than what sums in float64 may lose.
    """
    _, exponent = np.frexp(np.abs(scores).max())
    return np.rint(np.ldexp(scores, 62 - int(exponent) - len(scores).bit_length())).astype(np.int64)


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
        data = read_json(Path(path), unique=True)
        if not isinstance(data, dict) or not isinstance(data.get("assignments"), dict):
            raise UserError(f'{path} is no plan: it needs "assignments", a mapping of layers to options')
        version = data.get("version")
        if version != PLAN_VERSION:
            raise UserError(f"{path} has plan version {quoted(version)}; this flashmorph reads {PLAN_VERSION}")
        try:
            if problem := misfit(data, _PlanFile):
                raise UserError(problem)
            read = _PlanFile.model_validate(data)
            budget = Budget.parse(read.budget)
            return cls(read.assignments, budget, read.strategy, read.seed, read.teacher, read.revision, read.scores)
        except UserError as error:
            raise UserError(f"{path} is no plan: {error}") from error


class _PlanFile(Shape):
    """What a plan's file must hold; other keys are left alone."""

    assignments: Annotated[dict[_Word, _Word], Field(min_length=1, max_length=_MOST_GROUPS)]
    budget: str
    strategy: _Word = "by hand"
    seed: Count = 0
    teacher: str = ""
    revision: str = ""
    scores: list[list[Finite]] = []

    @model_validator(mode="after")
    def _scores_are_of_the_groups(self) -> "_PlanFile":
        if self.scores and len(self.scores) != len(self.assignments):
            raise ValueError(f"there are scores of {len(self.scores)} groups and {len(self.assignments)} groups")
        if any(len(row) < 2 for row in self.scores):
            raise ValueError("a group has scores of less than two options")
        return self


def _place(group: str) -> list[tuple[int, str]]:
    """Sorts addresses by their numbers: `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in group.split(".")]
