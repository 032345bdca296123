"""Preflight checks and the dry-run table."""

from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedConfig

from flashmorph.convert.teacher import Teacher
from flashmorph.data.corpus import shares_of
from flashmorph.data.documents import require_template
from flashmorph.errors import UserError
from flashmorph.hosts import configure, layer_space, with_branches_to_train
from flashmorph.recipe.fitting import require_within_limit
from flashmorph.recipe.pricing import budget_of_recipe
from flashmorph.recipe.recipe import Recipe
from flashmorph.records import Figures
from flashmorph.selection import STRATEGIES
from flashmorph.selection.racing import PATIENCE
from flashmorph.selection.search import asks_questions, check_search, own_settings
from flashmorph.selection.searchdata import step_shape
from flashmorph.selection.strategy import Swaps
from flashmorph.stages import TrainSettings, logits_on_disk
from flashmorph.tasks.turns import template_words

LEAST_QUESTIONS = 8
"""The fewest questions that decide whether a task is left out: an interval of fewer is too wide."""


def check(teacher: Teacher, recipe: Recipe, processes: int = 1) -> None:
    """Refuse a run that is bound to fail, before anything is written.

    Raises:
        UserError: see `check_recipe`; a tokenizer that does not fit or has no words for conversations, a damaged
            generation_config.json, or a batch that does not divide among so many ranks.
    """
    check_recipe(teacher.config, recipe)
    for settings in (recipe.align, recipe.distill, recipe.extend):
        if settings:
            settings.division(processes)
    for name in recipe.report_to:
        if not find_spec(name):
            raise UserError(f"report_to: {name} is not installed here; pip install {name}, or leave it out")
    teacher.generation()
    tokenizer = teacher.tokenizer()
    for corpus, _ in shares_of(recipe.data.corpus):
        if tokenizer and corpus.names_chat:
            require_template(tokenizer, corpus)
    if tokenizer and (recipe.chat_template or recipe.evaluate.chat_template):
        template_words(tokenizer, 1)


def check_recipe(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Check a teacher's configuration and a recipe.

    Raises:
        UserError: a budget that leaves no choice, saves nothing or has no costs, settings that the host or the strategy
            does not take, a context longer than the teacher's, or more of its tokens than it has.
    """
    host, own = configure(config, recipe.host)
    chosen, budget = recipe.select, budget_of_recipe(config, recipe)
    check_search(chosen.strategy, layer_space(host, own, budget), budget, chosen.search.questions, chosen.settings)
    require_within_limit(recipe, config)
    if (kept := recipe.distill.teacher_logits) and kept.top_k > config.vocab_size:
        raise UserError(
            f"distill.teacher_logits.top_k is {kept.top_k:,}; the teacher's vocabulary has {config.vocab_size:,} tokens"
        )


def goes_by_answers(recipe: Recipe) -> bool:
    """Whether a search by this recipe uses answers, and the recipe requires tasks with a signal."""
    return recipe.select.require_signal and asks_questions(recipe.select.strategy, recipe.select.settings)


def signal_questions(recipe: Recipe) -> int:
    """Questions of all tasks together that the stage `signal` asks of each plan: the search's own, or more."""
    return max(recipe.select.search.questions, LEAST_QUESTIONS * len(recipe.tasks))


def outlook(name: str, config: PreTrainedConfig, recipe: Recipe, given: bool = False) -> list[Figures]:
    """The cost of each stage for a teacher of this configuration: tokens, length and data; and the mean context.

    That is how many tokens before it a token of a training row can attend to. Tokens are None where they show on the
    way, the mean context where nothing is trained or the lengths of documents decide it. A `given` plan replaces the
    search.
    """
    source = recipe.data.about
    plans = 2 if recipe.baseline else 1
    host, _ = configure(config, recipe.host)
    rows: list[tuple[Any, ...]] = [("transplant", 0, 0, f"{name}: a probe batch")]
    longest, asks = recipe.select.search.longest, goes_by_answers(recipe) and not given
    if asks:
        number = recipe.select.teacher_questions
        about = f"{number} questions a task, which the teacher must be able to answer"
        rows.append(("teacher", number * len(recipe.tasks) * longest, longest, about))
    if with_branches_to_train(host):
        rows.append(_training_row("align", recipe.align, source, 1))
    else:
        rows.append(("align", 0, 0, "nothing to train"))
    if asks:
        number = signal_questions(recipe)
        rows.append(("signal", 2 * number * longest, longest, f"{number} questions, all layers full against none"))
    rows += [("select", 0, 0, "the plan that is given") if given else _search_row(recipe, source), ("build", 0, 0, "")]
    if costs := budget_of_recipe(config, recipe).costs:
        about = f"a token after {costs.context:,}, where the costs are of this device: {costs.origin}"
        rows.append(("timing", 0, 0, about))
    if kept := recipe.distill.teacher_logits:
        about = f"the teacher's {kept.top_k:,} likeliest next tokens, {logits_on_disk(recipe.distill, kept.top_k)}"
        rows.append(("logits", recipe.distill.tokens_run, recipe.distill.length, about))
    rows.append(_training_row("distill", recipe.distill, source, plans))
    if recipe.extend:
        rows.append(_training_row("extend", recipe.extend, source, plans))
    settings, models = recipe.evaluate, num_models(recipe)
    tokens = settings.questions * settings.length * len(recipe.tasks) + settings.perplexity_tokens
    about = f"{models} models, {settings.questions} questions a task"
    rows.append(("evaluate", tokens * models, settings.length, about))
    stages = [dict(zip(("stage", "tokens", "length", "data"), row, strict=True)) for row in rows]
    contexts = {name: context for name, (context, _) in training_contexts(config, recipe).items()}
    return [{**row, "mean_context": contexts.get(row["stage"])} for row in stages]


def training_contexts(config: PreTrainedConfig, recipe: Recipe) -> dict[str, tuple[float | None, str]]:
    """The mean context of each stage that trains, in tokens, and in words; see `outlook`."""
    host, _ = configure(config, recipe.host)
    settings: dict[str, TrainSettings] = {"align": recipe.align} if with_branches_to_train(host) else {}
    settings["distill"] = recipe.distill
    if recipe.distill.teacher_logits:
        settings["logits"] = recipe.distill
    if recipe.extend:
        settings["extend"] = recipe.extend
    return {name: _mean_context(each) for name, each in settings.items()}


def _mean_context(settings: TrainSettings) -> tuple[float | None, str]:
    most = (settings.length - 1) / 2
    return (None, f"by the text, at most {most:,.0f}") if settings.keeps_apart else (most, f"{most:,.0f}")


def num_models(recipe: Recipe) -> int:
    """Models that are evaluated: the teacher, and each plan before distillation and at its end; the hybrid also before
    it is extended."""
    plans = 2 if recipe.baseline else 1
    return 1 + 2 * plans + bool(recipe.extend)


def search_tokens(recipe: Recipe) -> tuple[int | None, float]:
    """Tokens that a search reads, and the mean length of their rows.

    Known beforehand for strategies that follow gradients or search nothing; None if it depends on the search.
    """
    search, strategy = recipe.select.search, recipe.select.strategy
    if not STRATEGIES[strategy].searches:
        return 0, 0.0
    if not STRATEGIES[strategy].gradient_loss:
        return None, search.longest
    steps = own_settings(strategy, recipe.select.settings)["steps"]
    shapes = [step_shape(search, recipe.seed, step) for step in range(steps + least_rounds(recipe))]
    # A round of races goes by at least one question of each task.
    shapes[steps:] = [(length, max(rows, len(recipe.tasks))) for length, rows in shapes[steps:]]
    tokens = sum(length * rows for length, rows in shapes)
    return tokens, sum(length * length * rows for length, rows in shapes) / max(1, tokens)


def least_rounds(recipe: Recipe) -> int:
    """The least number of races after the steps of the search; each begins with a step's batch."""
    return min(PATIENCE, swaps_of(recipe).rounds)


def swaps_of(recipe: Recipe) -> Swaps:
    """The races after the steps of the search."""
    strategy = recipe.select.strategy
    return STRATEGIES[strategy].swaps(own_settings(strategy, recipe.select.settings))


def _search_row(recipe: Recipe, source: str) -> tuple[str, int | None, int, str]:
    about = f"{recipe.select.strategy}: {', '.join(recipe.tasks)}, in {source}"
    if least_rounds(recipe):
        about += ", then races"
    return "select", search_tokens(recipe)[0], recipe.select.search.longest, about


def _training_row(name: str, settings: TrainSettings, source: str, times: int) -> tuple[str, int, int, str]:
    return name, settings.tokens_run * times, settings.length, source + (f", {times} plans" if times > 1 else "")
