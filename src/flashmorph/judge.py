"""Look at models and plans: score them on the same questions, or let them go on with a prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.continuation import continuation
from flashmorph.corpus import Corpus, Mixture
from flashmorph.errors import UserError
from flashmorph.evaluation import Score, answers_right, evaluate, greedy
from flashmorph.files import read_json, write_json
from flashmorph.heldout import HeldOut, hold_out
from flashmorph.hosts import cache_by_context
from flashmorph.morphable import Morphable
from flashmorph.plan import Plan
from flashmorph.recipe import Recipe
from flashmorph.run import Run
from flashmorph.rundata import open_questions
from flashmorph.runfolder import digest_of
from flashmorph.selection.cache import kept
from flashmorph.shapes import Finite
from flashmorph.special_tokens import before_text
from flashmorph.teacher import load_model, load_tokenizer, locate


def open_model(
    name: str, device: torch.device, tell: Callable[[str], None] = lambda notice: None, allow_unused: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, by folder or name; in float32 on a CPU, else in its own dtype.

    What is stored and not used goes to `tell`; see `flashmorph.teacher.load_model`.

    Raises:
        UserError: nothing there, damaged, or without a tokenizer.
    """
    folder, _, _ = locate(name)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer")
    dtype = torch.float32 if device.type == "cpu" else "auto"
    return load_model(folder, dtype, device, tell, allow_unused), tokenizer


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


def held_out(recipe: Recipe, corpus: Corpus | Mixture, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The text that perplexity is measured on.

    Raises:
        UserError: the corpus has no text of the test split.
    """
    settings = recipe.evaluate
    return hold_out(corpus, tokenizer, "test", settings.length, settings.perplexity_tokens, recipe.seed)


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


@torch.no_grad()
def continue_prompt(
    name: str,
    prompt: str,
    max_new_tokens: int,
    device: torch.device,
    tell: Callable[[str], None] = lambda notice: None,
    allow_unused: bool = False,
) -> str:
    """Greedy continuation of `prompt`, with the cache; `tell` and `allow_unused` as in `open_model`.

    Raises:
        UserError: see `open_model`; or the prompt is empty.
    """
    model, tokenizer = open_model(name, device, tell, allow_unused)
    ids = [*before_text(tokenizer), *tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids]
    if not ids:
        raise UserError("the prompt is empty; give some text to go on from")
    given = torch.tensor([ids], device=device)
    with greedy(model, tokenizer) as config:
        made = cast(Any, model).generate(
            given, attention_mask=torch.ones_like(given), generation_config=config, max_new_tokens=max_new_tokens
        )
    return continuation(tokenizer, ids, made[0, len(ids) :].tolist())
