"""Recall of a plan before distillation."""

from pathlib import Path

import numpy as np
import torch

from flashmorph.convert.load import load_config
from flashmorph.evaluation import answers_right
from flashmorph.files import digest_of, read_json, write_json
from flashmorph.inputs.shapes import Finite
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.recipe.questions import open_questions
from flashmorph.run.run import Run
from flashmorph.selection.cache import kept


def recall_of_plan(
    run: Run, morphable: Morphable, plan: Plan, split: str, seed: int, questions: int, folder: Path
) -> float:
    """Recall of a plan before distillation, by generated answers.

    The model has the dtype of an evaluation, and shares the weights of `morphable` that have it already.

    Args:
        run: Recipe, tokenizer and text.
        morphable: The host with its aligned branches.
        plan: The option of each group.
        split: The split of the questions.
        seed: Of the questions.
        questions: Questions of each task, each as long as the search's longest.
        folder: Where the figure is kept, and read on the next call.

    Returns:
        The mean over tasks of the share of right answers, 0 to 1.
    """
    dtype = dtype_of_recall(run)
    in_dtype = [] if dtype == torch.float32 else [str(dtype)]
    path = folder / f"recall-{digest_of([plan.assignments, split, seed, questions, *in_dtype])}.json"
    if kept(path, run.screen.say, Finite) is None:
        recipe = run.recipe.model_copy(update={"seed": seed})
        length = recipe.select.search.longest
        by_task = open_questions(recipe, run.corpus, run.tokenizer, split, questions, length, recipe.chat_template)
        model = morphable.instantiate(plan, dtype, shared=True).requires_grad_(False)
        at_once = recipe.evaluate.tokens_at_once
        hits = [np.mean(answers_right(model, run.tokenizer, examples, at_once)) for examples in by_task.values()]
        write_json(path, float(np.mean(hits)))
    return read_json(path)


def dtype_of_recall(run: Run) -> torch.dtype:
    """What the recipe's `evaluate.dtype` means on this device."""
    name = run.recipe.evaluate.dtype_on(run.device.type)
    if name != "auto":
        return getattr(torch, name)
    return load_config(run.teacher.folder).dtype or torch.float32
