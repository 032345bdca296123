"""Plans: an option for each group, and where the choice came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from flashmorph.errors import UserError, quoted
from flashmorph.files import read_json, write_json
from flashmorph.inputs.shapes import Count, Finite, Shape, misfit
from flashmorph.plan.budget import Budget
from flashmorph.plan.group import Group
from flashmorph.records import Figures

FULL = "full"
PLAN_VERSION = 1
_LONGEST = 60
_MOST_GROUPS = 100_000
_Word = Annotated[str, StringConstraints(max_length=_LONGEST)]


@dataclass(frozen=True)
class Plan:
    """Which option each group gets, and where the choice came from.

    `teacher` and `revision` name the model it was chosen for; `scores` are those that the strategy ranked by,
    a mapping from option to score for each group in turn, for the record.
    """

    assignments: dict[Group, str]
    budget: Budget
    strategy: str = "by hand"
    seed: int = 0
    teacher: str = ""
    revision: str = ""
    scores: list[dict[str, float]] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        groups = {Group(group): option for group, option in self.assignments.items()}
        in_order = dict(sorted(groups.items(), key=lambda item: item[0].sort_key))
        object.__setattr__(self, "assignments", in_order)

    @classmethod
    def of(cls, assignments: Mapping[str, str], budget: Budget) -> "Plan":
        """The plan with these options, by the addresses of the groups.

        Raises:
            UserError: an address is none.
        """
        return cls({Group(group): option for group, option in assignments.items()}, budget)

    @property
    def full_groups(self) -> list[Group]:
        """The groups that keep full attention, in order."""
        return [group for group, option in self.assignments.items() if option == FULL]

    @property
    def full_layers(self) -> list[int]:
        """The numbers of the layers that are full, with all their heads, in order."""
        return [layer for layer, options in self.by_layer().items() if options == {FULL}]

    @property
    def granularity(self) -> Budget:
        """A budget in the plan's own groups, layers or heads, for the space that it belongs to."""
        return Budget("heads" if self.has_heads else "layers", 1)

    @property
    def unit(self) -> str:
        """What its groups are, in words."""
        return "heads" if self.has_heads else "layers"

    @property
    def has_heads(self) -> bool:
        """Whether heads have options of their own."""
        return any(group.kv_head is not None for group in self.assignments)

    def by_layer(self) -> dict[int, set[str]]:
        """The options that each layer has, in order."""
        found: dict[int, set[str]] = {}
        for group, option in self.assignments.items():
            found.setdefault(group.layer, set()).add(option)
        return found

    def strip(self) -> str:
        """The plan as a strip of layers: ■ full, □ another option, ◧ heads of several.

        Where several other options are in use, each has a letter of its own in place of □: its first one that no
        option before it in the alphabet has.
        """
        others = sorted(set(self.assignments.values()) - {FULL})
        marks = {FULL: "■"}
        for option in others:
            letters = [letter for letter in option.upper() if letter.isalnum() and letter not in marks.values()]
            marks[option] = "□" if len(others) == 1 else (letters or ["?"])[0]
        return "".join(marks[next(iter(found))] if len(found) == 1 else "◧" for found in self.by_layer().values())

    def moved(self, group: str, option: str) -> "Plan":
        """The plan with another option for one group."""
        return replace(self, assignments={**self.assignments, Group(group): option}, scores=[])

    def in_short(self) -> str:
        """The full layers, `1, 3`, or the full heads, `2.1, 5.0`; the strip if several other options are chosen."""
        others = {option for option in self.assignments.values() if option != FULL}
        if self.has_heads:
            return ", ".join(f"{group.layer}.{group.kv_head}" for group in self.full_groups) or "none"
        if len(others) > 1:
            return self.strip()
        return ", ".join(map(str, self.full_layers)) or "none"

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON with a version number."""
        write_json(Path(path), self.to_dict())

    def to_dict(self) -> Figures:
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
            groups = {Group(group): option for group, option in read.assignments.items()}
            return cls(groups, budget, read.strategy, read.seed, read.teacher, read.revision, read.scores)
        except UserError as error:
            raise UserError(f"{path} is no plan: {error}") from error


def in_short(assignments: Mapping[str, str]) -> str:
    """`Plan.in_short` of a plan of which a file has the assignments alone."""
    return Plan.of(assignments, Budget("layers", 1)).in_short()


class _PlanFile(Shape):
    """The required keys of a plan's file; other keys are ignored."""

    assignments: Annotated[dict[_Word, _Word], Field(min_length=1, max_length=_MOST_GROUPS)]
    budget: str
    strategy: _Word = "by hand"
    seed: Count = 0
    teacher: str = ""
    revision: str = ""
    scores: list[dict[_Word, Finite]] = []

    @model_validator(mode="after")
    def _scores_are_of_the_groups(self) -> "_PlanFile":
        if self.scores and len(self.scores) != len(self.assignments):
            raise ValueError(f"there are scores of {len(self.scores)} groups and {len(self.assignments)} groups")
        if any(len(row) < 2 or FULL not in row for row in self.scores):
            raise ValueError(f"a group has scores of less than two options, or none of {FULL}")
        return self
