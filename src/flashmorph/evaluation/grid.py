"""The recall grid: tasks by context length, and by the depth of what is asked for."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, overload

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.errors import UserError, unknown
from flashmorph.evaluation.figures import Cell, Difference, Recall
from flashmorph.evaluation.intervals import paired_share_interval, share_interval
from flashmorph.evaluation.recall import answer_scores
from flashmorph.inputs.settings import Settings
from flashmorph.progress import Report, continued, silent
from flashmorph.records import Figures
from flashmorph.tasks import Lines, Prompt, Ruler


class Asker(Protocol):
    """A source of a grid's questions."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        ...

    def has_depth(self, name: str) -> bool:
        """Whether the depth of what a task asks for can be chosen."""
        ...

    def prompt(self, name: str, length: int, number: int, depth: float | None) -> Prompt:
        """Question `number` of a task at a context length, what it asks for at `depth` (0 the start, 1 the end).

        Raises:
            UserError: the task does not fit into `length` tokens.
        """
        ...


WORST = 3
ASKERS = {"lines": Lines, "ruler": Ruler}
"""The styles of a grid, each `(tokenizer, documents, seed, chat_template)`."""


class GridSettings(Settings):
    """Settings of a grid."""

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = Field(default=(), description="of the style's tasks only these; empty: all")
    depths: int = Field(default=5, gt=0, description="depths between the start and the end of the context")
    questions: int = Field(default=200, gt=0, description="questions a task and length, spread over the depths")
    style: Literal["lines", "ruler"] = "ruler"
    chat_template: bool = Field(default=False, description="ask through the tokenizer's chat template")
    batch_tokens: int = Field(default=32_768, gt=0, description="tokens run at once")

    @model_validator(mode="after")
    def _each_depth_is_asked(self) -> "GridSettings":
        if self.questions < self.depths:
            raise ValueError(
                f"{self.questions} questions are fewer than {self.depths} depths: give more questions, or fewer depths"
            )
        return self

    @property
    def depth_values(self) -> list[float]:
        """The depths, from the start of the context to its end; a single one is the middle."""
        return np.linspace(0, 1, self.depths).tolist() if self.depths > 1 else [0.5]


@dataclass(frozen=True)
class GridRow:
    """The scores of one task at one length, question by question; question i asks at `depths[i % len(depths)]`.

    `depths` is empty where a task has no single needle.
    """

    task: str
    length: int
    depths: tuple[float, ...]
    scores: list[float]

    def by_depth(self) -> dict[float | None, list[float]]:
        """Scores by depth; all under None where there is no depth."""
        if not self.depths:
            return {None: self.scores}
        return {depth: self.scores[number :: len(self.depths)] for number, depth in enumerate(self.depths)}

    def to_dict(self) -> Figures:
        """Recall with its interval, overall and by depth."""
        figures = {"task": self.task, "length": self.length, **_figure(self.scores)}
        cells = self.by_depth() if self.depths else {}
        return {**figures, "depths": [{"depth": depth, **_figure(cell)} for depth, cell in cells.items()]}


@dataclass(frozen=True)
class Grid:
    """`left_out` are the tasks that do not fit into a length, each with the reason."""

    rows: list[GridRow]
    left_out: list[str] = field(default_factory=list)

    @property
    def recall(self) -> float:
        """Mean over rows."""
        return float(np.mean([np.mean(row.scores) for row in self.rows]))

    def minus(self, other: "Grid") -> Figures:
        """Recall less another grid's, by row and as a whole, with paired intervals; rows that both have."""
        theirs = {(row.task, row.length): row.scores for row in other.rows}
        shared = [(row, theirs[row.task, row.length]) for row in self.rows if (row.task, row.length) in theirs]
        rows = [
            {"task": row.task, "length": row.length, **_difference([(row.scores, scores)])} for row, scores in shared
        ]
        return {**_difference([(row.scores, scores) for row, scores in shared]), "rows": rows}

    def worst(self, other: "Grid | None" = None) -> list[Cell]:
        """The `WORST` cells that are furthest below another grid's (or simply the lowest), worst first."""
        theirs = {(row.task, row.length): row.by_depth() for row in other.rows} if other else {}
        cells: list[Cell] = []
        for row in self.rows:
            for depth, scores in row.by_depth().items():
                cell: Cell = {"task": row.task, "length": row.length, "depth": depth, **_figure(scores)}
                if other and (row.task, row.length) in theirs:
                    cell["first"] = float(np.mean(theirs[row.task, row.length][depth]))
                cells.append(cell)
        below = [cell for cell in cells if cell["recall"] < cell.get("first", 1.0)]
        return sorted(below, key=lambda cell: cell["recall"] - cell.get("first", 0.0))[:WORST]

    def to_dict(self) -> Figures:
        """The figures with their 95 % intervals."""
        pooled = [score for row in self.rows for score in row.scores]
        figures = {"recall": self.recall, "interval": share_interval(pooled)}
        return {**figures, "rows": [row.to_dict() for row in self.rows], "left_out": self.left_out}


class _Prompts(Sequence[Prompt]):
    """The questions of a task at a length. Each is made when it is read: those of long contexts fill memory."""

    def __init__(self, asker: Asker, name: str, length: int, depths: Sequence[float | None], count: int):
        self._asker, self._name, self._length, self._depths, self._count = asker, name, length, depths, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Prompt: ...
    @overload
    def __getitem__(self, number: slice) -> list[Prompt]: ...
    def __getitem__(self, number: int | slice) -> Prompt | list[Prompt]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(self._count))]
        number = range(self._count)[number]
        return self._asker.prompt(self._name, self._length, number, self._depths[number % len(self._depths)])


@dataclass(frozen=True)
class GridQuestions:
    """A grid's prompts by task and length, depths by task (empty without a single needle), tasks that do not fit."""

    prompts: dict[tuple[str, int], Sequence[Prompt]]
    depths: dict[str, tuple[float, ...]]
    left_out: list[str]
    batch_tokens: int


def make_questions(asker: Asker, settings: GridSettings) -> GridQuestions:
    """A grid's questions; the first of each task and length is made at once, to see whether the task fits.

    Raises:
        UserError: the style has no such task, or no task fits into any length.
    """
    names = _chosen(settings, asker.names)
    depths = {name: tuple(settings.depth_values) if asker.has_depth(name) else () for name in names}
    prompts: dict[tuple[str, int], Sequence[Prompt]] = {}
    left_out: list[str] = []
    for name, length in itertools.product(names, settings.lengths):
        asked = _Prompts(asker, name, length, depths[name] or (None,), settings.questions)
        try:
            asked[0]
        except UserError as error:
            left_out.append(_left_out(name, length, error))
        else:
            prompts[name, length] = asked
    if not prompts:
        raise UserError(f"no task fits into {max(settings.lengths)} tokens; {left_out[0]}")
    return GridQuestions(prompts, depths, left_out, settings.batch_tokens)


def ask_grid(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: GridQuestions, report: Report = silent
) -> Grid:
    """Recall of `model` on every task at every length.

    A task of which a later question does not fit, whose values are longer than the first one's, is left out as well.
    """
    total, done = sum(map(len, questions.prompts.values())), 0
    rows, left_out = [], list(questions.left_out)

    for (name, length), asked in questions.prompts.items():
        try:
            scores = answer_scores(model, tokenizer, asked, questions.batch_tokens, continued(report, done, total))
        except UserError as error:
            left_out.append(_left_out(name, length, error))
        else:
            rows.append(GridRow(name, length, questions.depths[name], scores))
        done += len(asked)
    if not rows:
        raise UserError(f"no task fits; {left_out[0]}")
    return Grid(rows, left_out)


def _left_out(name: str, length: int, error: UserError) -> str:
    return f"{name} at {length}: {error}"


def _chosen(settings: GridSettings, names: Sequence[str]) -> list[str]:
    """The tasks that are asked for, in the style's own order."""
    for name in settings.tasks:
        if name not in names:
            raise UserError(unknown(f"task of the style {settings.style}", name, names))
    return [name for name in names if not settings.tasks or name in settings.tasks]


def _figure(scores: Sequence[float]) -> Recall:
    return {"recall": float(np.mean(scores)), "interval": share_interval(scores), "questions": len(scores)}


def _difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Difference:
    difference = float(np.mean([np.mean(one) - np.mean(other) for one, other in pairs]))
    return {"difference": difference, "interval": paired_share_interval(*map(list, zip(*pairs, strict=True)))}
