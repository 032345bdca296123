"""One run: what goes in, where it goes, what shows it, and what it found."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from flashmorph import distributed
from flashmorph.convert.load import load_config
from flashmorph.convert.teacher import Teacher
from flashmorph.data.corpus import Corpus, Mixture
from flashmorph.devices import usable_memory, use_bf16
from flashmorph.errors import UserError
from flashmorph.estimate.auto import Room, asked, chosen, resolved
from flashmorph.estimate.sizes import Sizes, count_sizes
from flashmorph.estimate.work import Model, model_of
from flashmorph.evaluation import Score, recall_difference
from flashmorph.plan import Plan
from flashmorph.progress import Report
from flashmorph.recipe.recipe import Recipe
from flashmorph.run.folder import RunFolder, Stage
from flashmorph.run.out_of_memory import within_memory
from flashmorph.selection import BASELINE


class Screen(Protocol):
    """What a person sees of a run."""

    def stage(self, name: str, about: str) -> AbstractContextManager[Report]:
        """A stage at work: its progress goes to the report."""
        ...

    def done(self, stage: Stage, about: str, figures: str) -> None:
        """A stage that is finished, or was already."""
        ...

    def say(self, text: str) -> None:
        """A line."""
        ...


@dataclass
class Run:
    """One `flashmorph morph`: what goes in, where it goes, and what shows it. A `given` plan stands for a search.

    With `allow_unused` weights that are stored in the teacher and not used are told, not refused. `left_out` names the
    tasks that its recipe had before `signal.with_signal` took them out.
    """

    teacher: Teacher
    recipe: Recipe
    folder: RunFolder
    device: torch.device
    screen: Screen
    given: Plan | None = None
    allow_unused: bool = False
    left_out: tuple[str, ...] = ()
    done: dict[str, Stage] = field(default_factory=dict)

    @property
    def corpus(self) -> Corpus | Mixture:
        """The recipe's text."""
        return self.recipe.data.corpus

    @property
    def bf16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return use_bf16(self.device) if self.recipe.bf16 == "auto" else self.recipe.bf16

    @property
    def shards(self) -> bool:
        """Whether weights are divided among the processes."""
        return self.recipe.shard and distributed.are_several()

    @property
    def loads_on(self) -> torch.device:
        """Where models are opened: on the device, unless it is too small for a whole one."""
        return torch.device("cpu") if self.shards else self.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer.

        Raises:
            UserError: it has none.
        """
        tokenizer = self.teacher.tokenizer()
        if tokenizer is None:
            raise UserError(f"{self.teacher.folder} has no tokenizer: only `flashmorph transplant` works without one")
        return tokenizer

    def at_once(self, stage: str, folder: Path, alone: bool = False) -> Recipe:
        """The recipe with numbers for what is `auto` in `stage`, from this device's memory; kept in its `folder`.

        `alone`: the first process does the stage.
        """
        if not asked(self.recipe, stage):
            return self.recipe
        processes = 1 if alone else distributed.count()
        bytes_here = usable_memory(self.device, 1 if alone else distributed.local_count())
        room = Room(bytes_here, processes, self.shards and not alone, self.bf16)
        recipe, too_large = distributed.first(lambda: resolved(stage, self.recipe, folder, *self._shape, room))
        for section in too_large:
            self.screen.say(
                f"{stage}: by the formulas of `flashmorph estimate` not one row of {section} fits into "
                f"{bytes_here / 2**30:,.1f} GiB; it goes on with one row at once"
            )
        return recipe

    @cached_property
    def _shape(self) -> tuple[Model, Sizes]:
        """The host and its sizes, counted without weights."""
        config = load_config(self.teacher.folder)
        model = model_of(config, self.recipe)
        return model, count_sizes(model.host, config, model.config, self.device)

    def stage(
        self,
        name: str,
        about: str,
        settings: Any,
        inputs: list[str],
        work: Callable[[Path, Report], dict | None],
        alone: bool = False,
    ) -> Stage:
        """Run one stage, or find that it is done, and show it.

        Every process does the `work`, or the first `alone` while the others wait.
        """
        label = f"{name} {about.split()[0]}" if name == "evaluate" or about.startswith(BASELINE) else name
        before, done = self.folder.last(label), self.folder.find(name, settings, inputs)
        if before and not done:
            self.screen.say(f"{label}: {self.folder.why_again(before, name, settings, inputs)}; running it again")
        set_seed(self.recipe.seed)

        def careful(folder: Path) -> dict:
            with within_memory(name, self.at_once(name, folder, alone)):
                figures = work(folder, report) or {}
            return {**figures, "auto": auto} if (auto := chosen(folder)) else figures

        def shared(folder: Path) -> dict:
            return distributed.first(lambda: careful(folder)) if alone else careful(folder)

        with self.screen.stage(name, about) as report:
            stage = self.folder.run(name, settings, inputs, shared)
        self.folder.remember(label, stage)
        self.done[stage.digest] = stage
        self.screen.done(stage, about, stage.record.get("summary", ""))
        return stage


@dataclass
class Results:
    """What `morph` found: scores by model, and the stages that made them."""

    plan: Plan
    scores: dict[str, Score]
    stages: list[Stage]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, `results.json`."""
        values: dict[str, Any] = {name: score.to_dict() for name, score in self.scores.items()}
        if BASELINE in self.scores:
            for after in ("", "_undistilled"):
                difference = recall_difference(self.scores[f"hybrid{after}"], self.scores[f"{BASELINE}{after}"])
                values[f"recall_hybrid{after}_minus_{BASELINE}"] = difference
        values["layers"] = {
            "plan": self.plan.strip(),
            "assignments": self.plan.assignments,
            "budget": str(self.plan.budget),
        }
        values["stages"] = [
            {name: stage.record.get(name) for name in ("stage", "digest", "seconds", "tokens")} for stage in self.stages
        ]
        return values
