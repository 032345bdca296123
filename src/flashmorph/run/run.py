"""`Run`: teacher, recipe, output folder, device and console of one `morph`; `Results`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from flashmorph import distributed
from flashmorph.convert.teacher import Teacher
from flashmorph.data.corpus import Corpus, Mixture
from flashmorph.devices import release_memory, usable_memory
from flashmorph.errors import UserError
from flashmorph.estimate.auto import Capacity, asked, chosen, must_shard, resolved, too_large, too_large_in_words
from flashmorph.estimate.sizes import Sizes, count_sizes
from flashmorph.estimate.work import Model, model_of
from flashmorph.evaluation import Score, perplexity_ratio, recall_difference
from flashmorph.plan import Budget, Plan
from flashmorph.progress import Report, Screen
from flashmorph.recipe.pricing import budget_of_recipe
from flashmorph.recipe.recipe import Recipe
from flashmorph.records import Figures
from flashmorph.run.folder import RunFolder, Stage
from flashmorph.run.out_of_memory import within_memory
from flashmorph.selection import BASELINE
from flashmorph.units import byte_size
from flashmorph.versions import own_version

_WHOLE = ("teacher", "evaluate", "logits")
"""Stages in which each rank holds a whole model, also where others divide its weights."""


@dataclass
class Run:
    """Teacher, recipe, output folder, device and console of one `flashmorph morph`. A `given` plan replaces the search.

    With `allow_unused`, stored weights of the teacher that are not used are reported, not refused. `left_out` names the
    tasks that `signal.with_signal` removed from the recipe. `shards`: whether weights are sharded over the ranks.
    """

    teacher: Teacher
    recipe: Recipe
    folder: RunFolder
    device: torch.device
    screen: Screen
    given: Plan | None = None
    allow_unused: bool = False
    left_out: tuple[str, ...] = ()
    shards: bool = False
    done: dict[str, Stage] = field(default_factory=dict)

    @property
    def corpus(self) -> Corpus | Mixture:
        """The recipe's text."""
        return self.recipe.data.corpus

    @property
    def bf16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return self.recipe.bf16_on(self.device)

    def budget(self, text: str | None = None) -> Budget:
        """The recipe's budget, or the one in `text`; one in milliseconds with its costs.

        Raises:
            UserError: see `budget_of_recipe`.
        """
        return budget_of_recipe(self.teacher.config, self.recipe, text)

    def must_shard(self) -> bool:
        """What `shards` has to be; every rank must ask, before any stage: in some stages one rank is alone."""
        if not distributed.are_several():
            return False
        capacity = self._capacity(shard=False)
        return distributed.first(lambda: must_shard(self.recipe, *self._shape, capacity))

    def say_what_is_too_large(self, stages: Collection[str]) -> None:
        """Print which of `stages` will not fit into the memory of this device, before hours go into those before."""
        capacity = self._capacity(self.shards)
        if large := distributed.first(lambda: too_large(self.recipe, *self._shape, capacity, stages)):
            self.screen.say(too_large_in_words(large, capacity))

    @property
    def loads_on(self) -> torch.device:
        """The device on which models are opened: the CPU if they are sharded afterwards."""
        return torch.device("cpu") if self.shards else self.device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, read once: no caller changes it.

        Raises:
            UserError: it has none.
        """
        tokenizer = self.teacher.tokenizer()
        if tokenizer is None:
            raise UserError(f"{self.teacher.folder} has no tokenizer: only `flashmorph transplant` works without one")
        return tokenizer

    def at_once(self, stage: str, folder: Path, alone: bool = False) -> Recipe:
        """The recipe with every `auto` of `stage` resolved from this device's memory; kept in the stage's `folder`.

        `alone`: the stage runs on rank 0 only.
        """
        if not asked(self.recipe, stage):
            return self.recipe
        capacity = self._capacity(self.shards and not alone and stage not in _WHOLE, alone)
        recipe, too_large = distributed.first(lambda: resolved(stage, self.recipe, folder, *self._shape, capacity))
        for section in too_large:
            self.screen.say(
                f"{stage}: by the formulas of `flashmorph estimate` not one row of {section} fits into "
                f"{byte_size(capacity.bytes)}; it goes on with one row at once"
            )
        return recipe

    def _capacity(self, shard: bool, alone: bool = False) -> Capacity:
        """What this process may fill, as one of all ranks or `alone`."""
        processes, here = (1, 1) if alone else (distributed.count(), distributed.local_count())
        return Capacity(usable_memory(self.device, here), processes, shard, self.bf16, self.device.type)

    @cached_property
    def _shape(self) -> tuple[Model, Sizes]:
        """The host and its sizes, counted without weights."""
        config = self.teacher.config
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
        label: str | None = None,
    ) -> Stage:
        """Run one stage unless it is finished already, and show it.

        Args:
            name: Of the stage, which begins the name of its folder.
            about: A few words for the console.
            settings: JSON values that enter the stage's digest.
            inputs: Digests of the stages that it reads.
            work: Called with the stage's folder and a report; returns figures for its record.
            alone: Whether `work` runs on rank 0 only, while the other ranks wait.
            label: By which the run's folder remembers the stage, where a run has several of this name.
        """
        label = label or name
        before, done = self.folder.last(label), self.folder.find(name, settings, inputs)
        if before and not done:
            self.screen.say(f"{label}: {self.folder.why_again(before, name, settings, inputs)}; running it again")
        set_seed(self.recipe.seed)

        def careful(folder: Path) -> dict:
            release_memory(self.device)
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
    """The results of `morph`: plan, scores by model, and stages; `timing` where the budget was in milliseconds.

    `base_model` and `revision` name the teacher, as in `Teacher`.
    """

    plan: Plan
    scores: dict[str, Score]
    stages: list[Stage]
    timing: Figures | None = None
    base_model: str = ""
    revision: str = ""

    @property
    def comparisons(self) -> Figures:
        """Of the hybrid with its teacher, and with the baseline before and after distillation; paired, by their names.

        The teacher's perplexity is left out where it was on another text.
        """
        hybrid, teacher = self.scores["hybrid"], self.scores["teacher"]
        values: Figures = {"recall_hybrid_minus_teacher": recall_difference(hybrid, teacher)}
        if ratio := perplexity_ratio(hybrid, teacher):
            values["perplexity_hybrid_over_teacher"] = ratio
        for after in ("", "_undistilled") if BASELINE in self.scores else ():
            difference = recall_difference(self.scores[f"hybrid{after}"], self.scores[f"{BASELINE}{after}"])
            values[f"recall_hybrid{after}_minus_{BASELINE}"] = difference
        return values

    def to_dict(self) -> Figures:
        """The content of `results.json`; `teacher` in it are the teacher's scores, so its name is in `base_model`."""
        values: Figures = {
            "version": own_version(),
            "base_model": {"name": self.base_model, "revision": self.revision or None},
        }
        values |= {name: score.to_dict() for name, score in self.scores.items()}
        values |= self.comparisons
        values["layers"] = {
            "plan": self.plan.strip(),
            "assignments": self.plan.assignments,
            "budget": str(self.plan.budget),
        }
        if self.timing:
            values["timing"] = self.timing
        values["stages"] = [
            {name: stage.record.get(name) for name in ("stage", "digest", "seconds", "tokens")} for stage in self.stages
        ]
        return values
