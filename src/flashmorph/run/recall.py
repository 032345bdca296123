"""Recall of plans before distillation."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from flashmorph.evaluation import answers_right
from flashmorph.files import digest_of, read_json, write_json
from flashmorph.inputs.shapes import Finite
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.recipe.questions import open_questions
from flashmorph.run.pools import Pools
from flashmorph.run.run import Run
from flashmorph.selection.cache import kept
from flashmorph.tasks import Example


class PlanRecall:
    """Recall of plans before distillation, by generated answers to the same questions.

    Models have the dtype of an evaluation, and share the weights of `morphable` that have it already.

    Args:
        run: Recipe, tokenizer and text.
        morphable: The host with its aligned branches.
        split: The split of the questions.
        seed: Of the questions.
        questions: Questions of each task, each as long as the search's longest.
        folder: Where figures are kept, and read again.
    """

    def __init__(self, run: Run, morphable: Morphable, split: str, seed: int, questions: int, folder: Path):
        self._run, self._morphable, self._folder = run, morphable, folder
        self._recipe = run.recipe.model_copy(update={"seed": seed})
        self._split, self._number, self._dtype = split, questions, dtype_of_recall(run)

    def of(self, plan: Plan) -> float:
        """The mean over tasks of the share of right answers, 0 to 1."""
        in_dtype = [] if self._dtype == torch.float32 else [str(self._dtype)]
        asked = [plan.assignments, self._split, self._recipe.seed, self._number, *in_dtype]
        path = self._folder / f"recall-{digest_of(asked)}.json"
        if kept(path, self._run.screen.say, Finite) is None:
            model = self._morphable.instantiate(plan, self._dtype, shared=True).requires_grad_(False)
            tokenizer, at_once = self._run.tokenizer, self._recipe.evaluate.tokens_at_once
            hits = [np.mean(answers_right(model, tokenizer, examples, at_once)) for examples in self._questions]
            write_json(path, float(np.mean(hits)))
        return read_json(path)

    @cached_property
    def _questions(self) -> list[Sequence[Example]]:
        """Of each task; making them reads much text."""
        recipe, length = self._recipe, self._recipe.select.search.longest
        by_task = open_questions(
            recipe, Pools(self._run), self._run.tokenizer, self._split, self._number, length, recipe.chat_template
        )
        return list(by_task.values())


def dtype_of_recall(run: Run) -> torch.dtype:
    """What the recipe's `evaluate.dtype` means on this device."""
    name = run.recipe.evaluate.dtype_on(run.device.type)
    stored = run.teacher.config.dtype or torch.float32 if name == "auto" else name
    return getattr(torch, stored) if isinstance(stored, str) else stored
