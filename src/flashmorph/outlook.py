"""Before anything is spent: what can be known to fail, and what each stage will take."""

from typing import Any

from flashmorph.errors import UserError
from flashmorph.hosts import configure
from flashmorph.plan import Budget, Space
from flashmorph.recipe import Recipe
from flashmorph.selection.search import check_settings
from flashmorph.stages import TrainSettings
from flashmorph.teacher import Teacher, load_config


def check(teacher: Teacher, recipe: Recipe) -> None:
    """What can be known to fail before anything is written.

    Raises:
        UserError: a budget that leaves no choice, settings that the host or the strategy does not have, a context
            longer than the teacher's, or a tokenizer that does not fit.
    """
    config = load_config(teacher.folder)
    configure(config, recipe.host)
    budget = Budget.parse(recipe.budget)
    strategy = recipe.select.strategy
    if strategy == "tolerance" and budget.resource != "loss":
        raise UserError(f"strategy tolerance finds the number of full layers itself: give loss=1%, not {budget}")
    if budget.resource not in ("kv", "loss") or strategy != "tolerance" and budget.resource == "loss":
        Space.of_layers(config.num_hidden_layers).limit(budget)
    check_settings(strategy, recipe.select.settings)
    longest = max(recipe.select.search.longest, recipe.evaluate.length)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"the recipe asks for contexts of {longest:,} tokens and the teacher's limit is "
            f"{config.max_position_embeddings:,}: lower select.search.length and evaluate.length"
        )
    teacher.tokenizer()


def outlook(teacher: Teacher, recipe: Recipe) -> list[dict[str, Any]]:
    """What each stage of a run will spend: tokens, length and data."""
    source, search = recipe.data.source, recipe.select.search
    plans = 2 if recipe.baseline else 1
    host, _ = configure(load_config(teacher.folder), recipe.host)
    align = _cost_row("align", recipe.align, source, 1) if host.branches_train else ("align", 0, 0, "nothing to train")
    rows = [("transplant", 0, 0, f"{teacher.name}: a probe batch"), align]
    strategy = recipe.select.strategy
    steps = recipe.select.settings.get("steps", 0)
    data = f"{strategy}: {', '.join(recipe.tasks)}, in {source}"
    rows += [("select", steps * search.batch_tokens, search.longest, data), ("build", 0, 0, "")]
    rows.append(_cost_row("distill", recipe.distill, source, plans))
    if recipe.extend:
        rows.append(_cost_row("extend", recipe.extend, source, plans))
    settings = recipe.evaluate
    tokens = settings.questions * settings.length * len(recipe.tasks) + settings.perplexity_tokens
    models = 2 + plans + (plans - 1) + bool(recipe.extend)
    rows.append(
        ("evaluate", tokens * models, settings.length, f"{models} models, {settings.questions} questions a task")
    )
    return [dict(zip(("stage", "tokens", "length", "data"), row, strict=True)) for row in rows]


def _cost_row(name: str, settings: TrainSettings, source: str, times: int) -> tuple[str, int, int, str]:
    return name, settings.tokens * times, settings.length, source + (f", {times} plans" if times > 1 else "")
