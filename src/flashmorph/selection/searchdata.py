"""The data of a search: batches to learn from and questions to judge by, each made from its number alone."""

import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from flashmorph.inputs.settings import Length, Many, Settings, TokensAtOnce
from flashmorph.tasks import Example, Layout, Style, TaskSettings, make_example
from flashmorph.tasks.counterfactual import Pair, make_pair

_USUAL_TOKENS = 16_384
USUAL_TEXT = 16_384


class SearchSettings(Settings):
    """The data of a search. `length` is the context in tokens; a range draws a length for each step."""

    length: Length | tuple[Length, Length] = Field(default=(1024, 16384), description="context, or [shortest, longest]")
    batch_tokens: TokensAtOnce = Field(default=16_384, description="tokens in a step")
    micro_batch_tokens: TokensAtOnce | Literal["auto"] = Field(
        default="auto", description="tokens at once on one device; `auto`: from its memory"
    )
    questions: Many = Field(default=64, description="questions of the search-validation split, over all tasks")
    text_tokens: TokensAtOnce = Field(
        default=USUAL_TEXT, description="tokens of held-out text, one context at least, for strategies that weigh text"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "SearchSettings":
        if self.shortest > self.longest:
            raise ValueError("length must be [shortest, longest]")
        return self

    @property
    def longest(self) -> int:
        """The longest context."""
        return self.length if isinstance(self.length, int) else self.length[1]

    @property
    def shortest(self) -> int:
        """The shortest context of a step."""
        return self.length if isinstance(self.length, int) else self.length[0]

    @property
    def tokens_at_once(self) -> int:
        """Tokens run at once on one device; a usual number while `auto` is not resolved (`estimate/auto.py`)."""
        return _USUAL_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @property
    def rows_at_once(self) -> int:
        """Rows that are run at once on one device."""
        return max(1, self.tokens_at_once // self.longest)


def step_shape(settings: SearchSettings, seed: int, step: int) -> tuple[int, int]:
    """Length and number of the rows of one training step."""
    length = settings.length
    if not isinstance(length, int):
        length = int(np.random.default_rng([seed, step]).integers(length[0], length[1] + 1))
    return length, max(1, settings.batch_tokens // length)


class SearchData:
    """Questions of the tasks in turn. `layouts` has one for the split `train` and one for the split that judges.

    Searches judge by `validation`; only the referee judges by `referee`.
    """

    def __init__(
        self,
        layouts: dict[str, Layout],
        style: Style,
        tasks: Sequence[TaskSettings],
        settings: SearchSettings,
        seed: int = 0,
    ):
        self._layouts, self._style, self._tasks, self.settings, self._seed = layouts, style, list(tasks), settings, seed
        (self._judging,) = set(layouts) - {"train"}
        self._questions: list[Example] | None = None

    def batch(self, step: int, each_task: bool = False) -> list[Example]:
        """The rows of one training step, of one length; with `each_task` at least one of each task."""
        length, rows = step_shape(self.settings, self._seed, step)
        rows = max(rows, self.num_tasks) if each_task else rows
        return [self._example("train", length, step * rows + row) for row in range(rows)]

    def text_batch(self, step: int) -> list[Example]:
        """The same, of text alone: every token counts as an answer."""
        length, rows = step_shape(self.settings, self._seed, step)
        rng = random.Random(f"{self._seed} text {step}")
        return [self._layouts["train"].plain(length, rng) for _ in range(rows)]

    def questions(self) -> list[Example]:
        """The questions of the split that judges, all of the longest length."""
        if self._questions is None:
            numbers = range(self.settings.questions)
            self._questions = [self._example(self._judging, self.settings.longest, number) for number in numbers]
        return self._questions

    @property
    def num_tasks(self) -> int:
        """The number of tasks that take turns."""
        return len(self._tasks)

    def pair(self, task: int, number: int) -> Pair | None:
        """A counterfactual pair of one task, of the longest length; None where none can be made."""
        layout, length = self._layouts["train"], self.settings.longest
        return make_pair(self._tasks[task], layout, self._style, "train", length, self._seed, number)

    def micro_batches(self, batch: Sequence[Any], length: int | None = None) -> list[Sequence[Any]]:
        """`batch`, of rows of `length` tokens, in pieces that are run at once; None: of the longest."""
        rows = max(1, self.settings.tokens_at_once // (length or self.settings.longest))
        return [batch[start : start + rows] for start in range(0, len(batch), rows)]

    def _example(self, split: str, length: int, number: int) -> Example:
        task = self._tasks[number % len(self._tasks)]
        return make_example(task, self._layouts[split], self._style, split, length, self._seed, number)
