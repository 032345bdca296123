"""Reproducible questions: the same seed, split and number always give the same one."""

import random
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from flashmorph.errors import quoted
from flashmorph.inputs.settings import Settings
from flashmorph.records import SettingValues
from flashmorph.tasks.hops import hops
from flashmorph.tasks.layout import Example, Layout
from flashmorph.tasks.many_keys import many_keys
from flashmorph.tasks.many_values import many_values
from flashmorph.tasks.problem import Task
from flashmorph.tasks.style import Style
from flashmorph.tasks.words import names

_MOST = 10_000
"""Keys, values, links or questions: more fit into no context."""
TASKS: dict[str, Task] = {"many_keys": many_keys, "many_values": many_values, "hops": hops}


class TaskSettings(Settings):
    """One task with its settings: `{task: many_keys, num_keys: 8}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    task: Annotated[str, Field(description=f"one of {', '.join(TASKS)}")]

    @model_validator(mode="after")
    def _known(self) -> "TaskSettings":
        if self.task not in TASKS:
            raise ValueError(f"task {quoted(self.task)} is unknown; there are {', '.join(TASKS)}")
        known = TASKS[self.task].__annotations__.keys() - {"rng", "style", "names", "return"}
        for name in self.settings:
            if name not in known:
                raise ValueError(f"task {self.task} has no setting {quoted(name)}; it has {', '.join(sorted(known))}")
            value = self.settings[name]
            if type(value) is not int:
                raise ValueError(f"{name} must be a whole number; got {quoted(value)}")
            if value > _MOST:
                raise ValueError(f"{name} must be at most {_MOST:,}; got {quoted(value)}")
        return self

    @property
    def settings(self) -> SettingValues:
        """The arguments of the task, by name."""
        return dict(self.model_extra or {})


def make_example(
    task: TaskSettings,
    layout: Layout,
    style: Style,
    split: str,
    length: int,
    seed: int,
    number: int,
) -> Example:
    """One question of `task` with its answer.

    Args:
        task: The task and its settings.
        layout: Lays problems out in a haystack.
        style: The wording of facts and questions.
        split: `train`, `validation`, `referee` or `test`: the names that are used.
        length: Tokens of the example.
        seed: With split, task, length and number, fixes the question.
        number: Of the question.

    Raises:
        UserError: the task does not fit into `length`, or asks for more names than the split has.
    """
    rng = random.Random(f"{seed} {split} {task.model_dump_json()} {length} {number}")
    problem = TASKS[task.task](rng, style, names(split), **task.settings)
    return layout.lay_out(problem, length, rng)
