"""How well does an embedded teacher retrieve? 200 questions a task on held-out names, values and text, by generation.

    python benchmarks/teacher.py --teacher tiny

Writes `benchmarks/results/teacher.json`.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

from flashmorph.cli.options import quiet
from flashmorph.convert.teacher import open_model, open_teacher
from flashmorph.devices import pick_device
from flashmorph.evaluation import Score, evaluate
from flashmorph.files import write_json
from flashmorph.hosts import cache_by_context
from flashmorph.recipe.questions import held_out, open_questions
from flashmorph.recipe.recipe import Recipe, load_recipe

QUESTIONS = 200


def score_model(name: str, recipe: Recipe, device: torch.device) -> Score:
    """Recall, perplexity and cache of one model by the recipe's tasks.

    Raises:
        UserError: see `open_model`; or the corpus has no text of the test split.
    """
    model, tokenizer = open_model(name, device)
    corpus = recipe.data.corpus
    text = held_out(recipe, corpus, tokenizer)
    questions = open_questions(recipe, corpus, tokenizer)
    return evaluate(model, tokenizer, questions, text, recipe.evaluate, cache_by_context(model.config))


def main() -> None:
    """Score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny")
    arguments = parser.parse_args()
    quiet()
    recipe = load_recipe("demo", {"evaluate.questions": QUESTIONS})
    figures = score_model(arguments.teacher, recipe, pick_device()).to_dict()
    command = f"python benchmarks/teacher.py --teacher {arguments.teacher}"
    digest = open_teacher(arguments.teacher).digest
    write_json(Path("benchmarks/results/teacher.json"), {"command": command, "teacher": digest, **figures})
    for task, value in figures["recall_by_task"].items():
        low, high = value["interval"]
        Console().print(f"{task:<14} {100 * value['recall']:.1f} % ({100 * low:.1f}-{100 * high:.1f})")
    Console().print(f"perplexity     {figures['perplexity']:.3f}")


if __name__ == "__main__":
    main()
