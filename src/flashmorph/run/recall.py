"""Recall of a plan before distillation."""

from pathlib import Path

import numpy as np

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
    path = folder / f"recall-{digest_of([plan.assignments, split, seed, questions])}.json"
    if kept(path, run.screen.say, Finite) is None:
        recipe = run.recipe.model_copy(update={"seed": seed})
        length = recipe.select.search.longest
        by_task = open_questions(recipe, run.corpus, run.tokenizer, split, questions, length, recipe.chat_template)
        model = morphable.instantiate(plan)
        hits = [np.mean(answers_right(model, run.tokenizer, examples)) for examples in by_task.values()]
        write_json(path, float(np.mean(hits)))
    return read_json(path)
