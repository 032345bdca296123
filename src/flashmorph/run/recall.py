"""What a plan can answer before it is distilled."""

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
    """Recall of a plan before distillation: `questions` generated answers a task to questions of `split`.

    They are as long as the search's. The figure is kept in `folder`.
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
