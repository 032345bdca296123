"""Costs of layers and heads in microseconds, which budgets in milliseconds are spent by (docs/decisions/0033)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints

from flashmorph.errors import UserError, quoted
from flashmorph.files import digest_of, read_json
from flashmorph.inputs.shapes import Shape, misfit
from flashmorph.plan.group import Group
from flashmorph.records import Figures

COSTS_VERSION = 1
_LARGEST = 2**40
_MOST_GROUPS = 100_000
_Word = Annotated[str, StringConstraints(min_length=1, max_length=60)]
_Microseconds = Annotated[int, Field(ge=0, le=_LARGEST)]


@dataclass(frozen=True)
class Costs:
    """What one generated token after `context` others takes, in whole microseconds, rounded up.

    A plan takes `base`, which is the same for every plan, and for each group the cost of its option in `groups`.
    `shape` is the digest of the host's configuration with every layer full (`hosts.shape_of`), `host` its class and
    `teacher` a name for messages. `source` says where the figures are from: `kind` is `measured`, with `device`,
    `dtype` and on a CPU `threads`, or `estimated`, with the GPU as `device`.
    """

    teacher: str
    host: str
    shape: str
    context: int
    source: Mapping[str, Any]
    base: int
    groups: Mapping[Group, Mapping[str, int]]

    @classmethod
    def of_seconds(cls, full: float, extra: Mapping[str, float], groups: Sequence[Group], **about: Any) -> "Costs":
        """Costs of groups that are all alike.

        Args:
            full: Seconds of a token with every group full.
            extra: By option, seconds that a group takes beyond a full one: 0 for `full`, negative where it takes less.
            groups: The groups.
            **about: The other fields.

        Raises:
            UserError: switching every group would save more time than a token takes.
        """
        least = min(extra.values())
        rest = full + len(groups) * least
        if rest < 0:
            raise UserError(
                f"a token takes {1e3 * full:.3f} ms, and switching {len(groups)} groups would save "
                f"{-1e3 * len(groups) * least:.3f} ms: the measurement is too noisy, give more --repeats on a quiet "
                "machine, or a longer context"
            )
        row = {option: _microseconds(value - least) for option, value in extra.items()}
        return cls(base=_microseconds(rest), groups={group: dict(row) for group in groups}, **about)

    @property
    def measured(self) -> bool:
        """Whether the figures were measured."""
        return self.source["kind"] == "measured"

    @property
    def origin(self) -> str:
        """Where the figures are from, in words."""
        device = self.source["device"]
        return f"measured on {device} in {self.source['dtype']}" if self.measured else f"estimated for {device}"

    @cached_property
    def digest(self) -> str:
        """Of all that the file holds."""
        return digest_of(self.to_dict())

    def table(self, groups: Sequence[Group], options: Sequence[str]) -> np.ndarray:
        """The cost of each option of each group, `[groups, options]`, in microseconds.

        Raises:
            UserError: the costs are those of other groups or options.
        """
        if (wrong := set(groups) ^ set(self.groups)) or len(groups) != len(self.groups):
            raise UserError(
                f"the costs are those of {len(self.groups)} groups and the model has {len(groups)}: "
                f"{sorted(wrong)[0]} is in one of the two only; measure or estimate them for this model"
            )
        for group in groups:
            if set(self.groups[group]) != set(options):
                raise UserError(
                    f"the costs have {', '.join(self.groups[group])} for {group}, which can be {', '.join(options)} "
                    "here: measure or estimate them with the same mixers"
                )
        return np.array([[float(self.groups[group][option]) for option in options] for group in groups])

    def of(self, assignments: Mapping[Group, str]) -> int:
        """Microseconds of a token under a plan's `assignments`, by these costs."""
        return self.base + sum(self.groups[group][option] for group, option in assignments.items())

    def to_dict(self) -> Figures:
        """The JSON form."""
        return {
            "version": COSTS_VERSION,
            "teacher": self.teacher,
            "host": self.host,
            "shape": self.shape,
            "context": self.context,
            "source": dict(self.source),
            "base_microseconds": self.base,
            "microseconds": {group: dict(row) for group, row in self.groups.items()},
        }

    @classmethod
    def load(cls, path: Path | str) -> "Costs":
        """Read costs.

        Raises:
            UserError: no such file, no JSON, another version, or something else than costs.
        """
        data = read_json(Path(path), unique=True)
        if not isinstance(data, dict) or "microseconds" not in data:
            raise UserError(f'{path} has no costs: it needs "microseconds", a mapping of layers or heads to options')
        if data.get("version") != COSTS_VERSION:
            raise UserError(
                f"{path} has costs of version {quoted(data.get('version'))}; this flashmorph reads {COSTS_VERSION}"
            )
        if problem := misfit(data, _CostsFile):
            raise UserError(f"{path} has no costs: {problem}")
        read = _CostsFile.model_validate(data)
        source = read.source.model_dump(exclude_none=True)
        try:
            groups = {Group(group): row for group, row in read.microseconds.items()}
        except UserError as error:
            raise UserError(f"{path} has no costs: {error}") from error
        return cls(read.teacher, read.host, read.shape, read.context, source, read.base_microseconds, groups)


def _microseconds(seconds: float) -> int:
    """Rounded up, but for what a float is off by."""
    return math.ceil(round(1e6 * seconds, 6))


class _Source(Shape):
    """Where costs are from."""

    kind: Literal["measured", "estimated"]
    device: _Word
    dtype: _Word
    threads: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None


class _CostsFile(Shape):
    """The required keys of a file of costs; other keys are ignored."""

    teacher: str
    host: _Word
    shape: _Word
    context: Annotated[int, Field(ge=1, le=_LARGEST)]
    source: _Source
    base_microseconds: _Microseconds
    microseconds: Annotated[
        dict[_Word, Annotated[dict[_Word, _Microseconds], Field(min_length=2)]],
        Field(min_length=1, max_length=_MOST_GROUPS),
    ]
