"""Several models on the same questions and the same text, each compared with the first."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashmorph.convert.load import load_config, load_tokenizer
from flashmorph.convert.teacher import locate, open_model
from flashmorph.data.corpus import Corpus, Mixture
from flashmorph.data.heldout import HeldOut
from flashmorph.devices import usable_memory
from flashmorph.errors import UserError
from flashmorph.estimate.auto import Capacity, asked, choose
from flashmorph.estimate.sizes import count_sizes
from flashmorph.estimate.work import model_in
from flashmorph.evaluation import (
    ASKERS,
    Grid,
    GridSettings,
    Score,
    ask_grid,
    evaluate,
    make_questions,
    paired_share_interval,
    perplexity_ratio,
    recall_difference,
)
from flashmorph.evaluation.harness import Harness, HarnessFigure
from flashmorph.evaluation.tokens import TokenClasses
from flashmorph.hosts import cache_by_context, require_known
from flashmorph.progress import Screen
from flashmorph.recipe.fitting import fit
from flashmorph.recipe.questions import held_out, open_questions
from flashmorph.recipe.recipe import Recipe, with_settings
from flashmorph.records import Figures
from flashmorph.run.folder import STAGES


@dataclass(frozen=True)
class Wanted:
    """What is measured of every model: the recipe's tasks and text, and optional parts.

    With `allow_unused`, stored weights that are not used are reported, not refused.
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
class Evaluated:
    """The results of one model."""

    score: Score
    vocabulary: dict[str, int]
    text: HeldOut
    grid: Grid | None = None
    harness: list[HarnessFigure] = field(default_factory=list)
    classes: TokenClasses | None = None


def homes(names: Sequence[str]) -> tuple[Path, ...]:
    """The folders of models; of a stage's model, the folder of its run.

    Raises:
        UserError: there is no such model.
    """
    folders = [locate(name)[0] for name in names]
    return tuple(folder.parents[2] if folder.parts[-3:-2] == (STAGES,) else folder for folder in folders)


def fit_to_models(names: Sequence[str], recipe: Recipe, device: torch.device) -> tuple[Recipe, str]:
    """The recipe with questions that every model takes, as many at once as fit for each; and a line on what was capped.

    Raises:
        UserError: no such model, or of a kind that is not known.
    """
    configs = [load_config(locate(name)[0]) for name in names]
    for name, config in zip(names, configs, strict=True):
        require_known(config, name)
    shortest = min(configs, key=lambda config: config.max_position_embeddings)
    recipe, notice = fit(recipe, shortest, ["evaluate.length"])
    if not asked(recipe, "evaluate"):
        return recipe, notice
    models = [model_in(config) for config in configs]
    capacity = Capacity(usable_memory(device), kind=device.type)
    every = [
        choose("evaluate", recipe, model, count_sizes(model.host, model.config, model.config, device), capacity).values
        for model in models
    ]
    return with_settings(recipe, {key: min(values[key] for values in every) for key in every[0]}), notice


def check(names: Sequence[str], longest: int, written: int = 0) -> None:
    """Refuse what is bound to fail, before any weight is read.

    Raises:
        UserError: no such model, of a kind that is not known, or with a shorter limit than the `longest` context and
            the tokens `written` after it.
    """
    for name in names:
        config = load_config(locate(name)[0])
        require_known(config, name)
        limit = config.max_position_embeddings
        if longest + written > limit:
            after = f", and {written:,} are written after them: at most {limit - written:,} fit" if written else ""
            raise UserError(f"{name} takes contexts of at most {limit:,} tokens; {longest:,} are asked for{after}")


def _require_one_tokenizer(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise UserError("--tokens compares the losses of models: give at least two")
    tokenizers = {name: load_tokenizer(locate(name)[0]) for name in names}
    vocabularies = {name: tokenizer and tokenizer.get_vocab() for name, tokenizer in tokenizers.items()}
    for name, vocabulary in vocabularies.items():
        if vocabulary != vocabularies[names[0]]:
            raise UserError(f"{name} has another tokenizer than {names[0]}: losses can only be compared token by token")


def compare_models(names: Sequence[str], wanted: Wanted, device: torch.device, screen: Screen) -> Figures:
    """Figures by model; all but the first also have `minus_first`, with intervals paired by question and by text.

    Raises:
        UserError: see `check` and `open_model`; or the corpus has no text of the test split.
    """
    names = list(dict.fromkeys(names))
    check(names, wanted.longest)
    if wanted.tokens:
        _require_one_tokenizer(names)
    evaluated: dict[str, Evaluated] = {}
    for name in names:
        evaluated[name] = _judge(name, wanted, device, screen, evaluated.get(names[0]))
    first = evaluated[names[0]]
    return {name: _figures(each, None if each is first else first) for name, each in evaluated.items()}


def _judge(
    name: str, wanted: Wanted, device: torch.device, screen: Screen, first: Evaluated | None = None
) -> Evaluated:
    """The results of one model, on the same text as the `first` if it has the same vocabulary."""
    recipe, corpus = wanted.recipe, wanted.corpus
    dtype = recipe.evaluate.dtype_on(device.type)
    model, tokenizer = open_model(name, device, screen.say, wanted.allow_unused, dtype)
    vocabulary = tokenizer.get_vocab()
    grid = None
    if wanted.grid:
        with screen.stage("evaluate", f"{name}: questions"):
            documents, templated = corpus.pool("test", recipe.seed), wanted.grid.chat_template
            asker = ASKERS[wanted.grid.style](tokenizer, documents, recipe.seed, templated)
            grid = make_questions(asker, wanted.grid)
    of_harness = []
    if wanted.harness:  # First, since it fetches data, which may fail.
        settings = recipe.evaluate
        with screen.stage("evaluate", f"{name}: lm-evaluation-harness"):
            batch_size = max(1, settings.tokens_at_once // settings.length)
            of_harness = wanted.harness.scores(model, tokenizer, locate(name)[0], batch_size)
    with screen.stage("evaluate", f"{name}: tasks, text") as report:
        questions = open_questions(recipe, corpus, tokenizer)
        same = first is not None and first.vocabulary == vocabulary
        text = first.text if first and same else held_out(recipe, corpus, tokenizer)
        score = evaluate(model, tokenizer, questions, text, recipe.evaluate, cache_by_context(model.config), report)
        evaluated = Evaluated(score, vocabulary, text, harness=of_harness)
        if wanted.tokens:
            evaluated.classes = first.classes if first else TokenClasses.of(text, tokenizer)
    if grid:
        with screen.stage("evaluate", f"{name}: grid") as report:
            evaluated.grid = ask_grid(model, tokenizer, grid, report)
    return evaluated


def _figures(evaluated: Evaluated, first: Evaluated | None) -> Figures:
    figures = evaluated.score.to_dict()
    if evaluated.harness:
        figures["harness"] = [figure.to_dict() for figure in evaluated.harness]
    if evaluated.grid:
        figures["grid"] = {**evaluated.grid.to_dict(), "worst": evaluated.grid.worst(first.grid if first else None)}
    if first is None:
        return figures
    by_task = {}
    for task, right in evaluated.score.right.items():
        other = first.score.right[task]
        low, high = paired_share_interval([right], [other])
        by_task[task] = {"difference": (sum(right) - sum(other)) / len(right), "interval": (low, high)}
    minus: Figures = {"recall": {**recall_difference(evaluated.score, first.score), "by_task": by_task}}
    if evaluated.vocabulary == first.vocabulary:
        minus["perplexity"] = perplexity_ratio(evaluated.score, first.score)
    if evaluated.grid and first.grid:
        minus["grid"] = evaluated.grid.minus(first.grid)
    if evaluated.harness:
        theirs = {(figure.task, figure.metric): figure for figure in first.harness}
        pairs = [(figure, theirs[figure.task, figure.metric]) for figure in evaluated.harness]
        minus["harness"] = [
            {"task": one.task, "metric": one.metric, **difference}
            for one, other in pairs
            if (difference := one.minus(other))
        ]
    own, theirs = evaluated.score.losses, first.score.losses
    if evaluated.classes and own is not None and theirs is not None:
        minus["tokens"] = evaluated.classes.compare(own, theirs)
    return {**figures, "minus_first": minus}
