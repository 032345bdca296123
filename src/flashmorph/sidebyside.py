"""Several models on the same questions and the same text, each compared with the first."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch

from flashmorph.corpus import Corpus, Mixture
from flashmorph.errors import UserError
from flashmorph.evaluation import (
    ASKERS,
    Grid,
    GridSettings,
    Score,
    ask_grid,
    evaluate,
    make_questions,
    paired_interval,
    perplexity_ratio,
    recall_difference,
    text_losses,
)
from flashmorph.evaluation.harness import Harness, HarnessFigure
from flashmorph.evaluation.tokens import TokenClasses
from flashmorph.hosts import cache_by_context, require_known
from flashmorph.judge import held_out, open_model
from flashmorph.progress import Report
from flashmorph.recipe import Recipe
from flashmorph.rundata import open_questions
from flashmorph.teacher import EMBEDDED, load_config, load_tokenizer, locate


class Screen(Protocol):
    """What shows how far the work is."""

    def stage(self, name: str, about: str) -> AbstractContextManager[Report]:
        """A model at work: its progress goes to the report."""
        ...

    def say(self, text: str) -> None:
        """A line."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What is asked of every model: the recipe's tasks and text; the rest where asked for.

    With `allow_unused` weights that are stored and not used are told, not refused.
    """

    recipe: Recipe
    grid: GridSettings | None = None
    harness: Harness | None = None
    tokens: bool = False
    allow_unused: bool = False

    @property
    def longest(self) -> int:
        """The longest context."""
        return max(self.recipe.evaluate.length, *(self.grid.lengths if self.grid else ()), 0)

    @property
    def corpus(self) -> Corpus | Mixture:
        """The recipe's text."""
        return self.recipe.data.corpus


@dataclass
class Found:
    """What one model did."""

    score: Score
    vocabulary: dict[str, int]
    grid: Grid | None = None
    harness: list[HarnessFigure] = field(default_factory=list)
    losses: np.ndarray | None = None
    classes: TokenClasses | None = None


def own_recipe(name: str) -> str | None:
    """The recipe that a model came with: that of its run, or the embedded teachers' `demo`.

    Raises:
        UserError: there is no such model.
    """
    if name in EMBEDDED and not Path(name).is_dir():
        return "demo"
    path = locate(name)[0] / "recipe.yaml"
    return str(path) if path.is_file() else None


def check(names: Sequence[str], longest: int) -> None:
    """Refuse what is bound to fail, before any weight is read.

    Raises:
        UserError: no such model, of a kind that is not known, or with a shorter limit than `longest` tokens.
    """
    for name in names:
        config = load_config(locate(name)[0])
        require_known(config, name)
        limit = config.max_position_embeddings
        if longest > limit:
            raise UserError(f"{name} takes contexts of at most {limit:,} tokens; {longest:,} are asked for")


def _require_one_tokenizer(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise UserError("--tokens compares the losses of models: give at least two")
    tokenizers = {name: load_tokenizer(locate(name)[0]) for name in names}
    vocabularies = {name: tokenizer and tokenizer.get_vocab() for name, tokenizer in tokenizers.items()}
    for name, vocabulary in vocabularies.items():
        if vocabulary != vocabularies[names[0]]:
            raise UserError(f"{name} has another tokenizer than {names[0]}: losses can only be compared token by token")


def compare_models(names: Sequence[str], wanted: Wanted, device: torch.device, screen: Screen) -> dict[str, Any]:
    """Figures by model; all but the first also have `minus_first`, with intervals paired by question and by row.

    Raises:
        UserError: see `check` and `open_model`; or the corpus has no text of the test split.
    """
    names = list(dict.fromkeys(names))
    check(names, wanted.longest)
    if wanted.tokens:
        _require_one_tokenizer(names)
    found: dict[str, Found] = {}
    for name in names:
        classes = found[names[0]].classes if found else None
        found[name] = _judge(name, wanted, device, screen, classes)
    first = found[names[0]]
    return {name: _figures(each, None if each is first else first) for name, each in found.items()}


def _judge(
    name: str, wanted: Wanted, device: torch.device, screen: Screen, classes: TokenClasses | None = None
) -> Found:
    recipe, corpus = wanted.recipe, wanted.corpus
    model, tokenizer = open_model(name, device, screen.say, wanted.allow_unused)
    grid = None
    if wanted.grid:
        with screen.stage("evaluate", f"{name}: questions") as report:
            asker = ASKERS[wanted.grid.style](tokenizer, corpus.pool("test", recipe.seed), recipe.seed)
            grid = make_questions(asker, wanted.grid, report)
    with TemporaryDirectory() as folder, screen.stage("evaluate", f"{name}: tasks, text") as report:
        questions = open_questions(recipe, corpus, tokenizer)
        rows = held_out(recipe, corpus, tokenizer, Path(folder))
        score = evaluate(model, tokenizer, questions, rows, recipe.evaluate, cache_by_context(model.config), report)
        found = Found(score, tokenizer.get_vocab())
        if wanted.tokens:
            found.losses = text_losses(model, rows, recipe.evaluate.batch_tokens).double().numpy()
            found.classes = classes or TokenClasses.of(rows, tokenizer)
    if grid:
        with screen.stage("evaluate", f"{name}: grid") as report:
            found.grid = ask_grid(model, tokenizer, grid, report)
    if wanted.harness:
        settings = recipe.evaluate
        with screen.stage("evaluate", f"{name}: lm-evaluation-harness"):
            batch_size = max(1, settings.batch_tokens // settings.length)
            found.harness = wanted.harness.scores(model, tokenizer, locate(name)[0], batch_size)
    return found


def _figures(found: Found, first: Found | None) -> dict[str, Any]:
    figures = found.score.to_dict()
    if found.harness:
        figures["harness"] = [figure.to_dict() for figure in found.harness]
    if found.grid:
        figures["grid"] = {**found.grid.to_dict(), "worst": found.grid.worst(first.grid if first else None)}
    if first is None:
        return figures
    by_task = {}
    for task, right in found.score.right.items():
        other = first.score.right[task]
        low, high = paired_interval([right], [other])
        by_task[task] = {"difference": (sum(right) - sum(other)) / len(right), "interval": (low, high)}
    minus: dict[str, Any] = {"recall": {**recall_difference(found.score, first.score), "by_task": by_task}}
    if found.vocabulary == first.vocabulary:
        minus["perplexity"] = perplexity_ratio(found.score, first.score)
    if found.grid and first.grid:
        minus["grid"] = found.grid.minus(first.grid)
    if found.harness:
        theirs = {(figure.task, figure.metric): figure for figure in first.harness}
        pairs = [(figure, theirs[figure.task, figure.metric]) for figure in found.harness]
        minus["harness"] = [
            {"task": one.task, "metric": one.metric, **difference}
            for one, other in pairs
            if (difference := one.minus(other))
        ]
    if found.losses is not None and found.classes and first.losses is not None:
        minus["tokens"] = found.classes.compare(found.losses, first.losses)
    return {**figures, "minus_first": minus}
