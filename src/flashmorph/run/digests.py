"""The settings that enter the digest of each stage, as JSON values; the digest names its folder (`folder.py`).

Every setting that changes a result is here, and no other: not the micro-batch size, the checkpoint interval, the
progress display or the limit on repeated text.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from flashmorph.data.identity import has_conversations, identity_of
from flashmorph.plan import Budget
from flashmorph.records import Figures, SettingValues
from flashmorph.run.run import Run
from flashmorph.selection import STRATEGIES
from flashmorph.selection.search import own_settings
from flashmorph.selection.searchdata import USUAL_TEXT, SearchSettings
from flashmorph.stages import ExtendSettings, TrainSettings
from flashmorph.tasks import TaskSettings
from flashmorph.tasks.turns import ends_turns
from flashmorph.tokens.special_tokens import end_tokens


def text_settings(run: Run) -> SettingValues:
    """Settings that rows of text depend on: text, order, tokenizer and, for conversations, the chat template."""
    template = {"template": run.teacher.template_digest} if has_conversations(run.corpus) else {}
    return {**read_settings(run), "tokenizer": run.teacher.tokenizer_digest, **template}


def task_settings(run: Run, chat_template: bool | None = None) -> SettingValues:
    """Settings that questions depend on: tasks, haystack, style, tokenizer and chat template.

    `chat_template`: whether questions use the teacher's; None: as in a search.
    """
    recipe = run.recipe
    templated = recipe.chat_template if chat_template is None else chat_template
    repeated = recipe.data.haystack == "repeated"
    hidden_in = {"haystack": "repeated", "seed": recipe.seed} if repeated else read_settings(run)
    tasks = {"tasks": plain(recipe.tasks.values()), "style": recipe.style}
    worded = {"template": run.teacher.template_digest} if templated else {}
    return {**tasks, **hidden_in, "tokenizer": run.teacher.tokenizer_digest, "chat_template": worded}


def row_settings(run: Run, settings: TrainSettings) -> SettingValues:
    """Settings that the rows of a training stage depend on."""
    questions = settings.questions
    asked = {"questions": [questions, task_settings(run)]} if questions else {}
    long = {"documents": "long"} if settings.takes_long_documents else {}
    unlearned = {} if learns_ends(run, settings) else {"ends": "not learned"}
    return {"rows": [settings.length, settings.rows], **long, **unlearned, **text_settings(run), **asked}


def learns_ends(run: Run, settings: TrainSettings) -> bool:
    """Whether the token that ends a text is a target: from next tokens a hybrid would learn to end a turn after it."""
    return settings.stage != ExtendSettings.stage or not ends_turns(run.tokenizer)


def training_settings(run: Run, settings: TrainSettings) -> SettingValues:
    """Settings that the result of a training stage depends on."""
    return {"train": settings.what_counts(), "bf16": run.bf16, **row_settings(run, settings)}


def logit_settings(run: Run, settings: TrainSettings, top_k: int) -> SettingValues:
    """Settings that enter the digest of a stage that reads another stage's training rows (`logits`)."""
    return {"top_k": top_k, "isolate_documents": settings.keeps_apart, "bf16": run.bf16, **row_settings(run, settings)}


def select_settings(run: Run) -> SettingValues:
    """Settings that a search depends on, with the strategy's defaults written out; unused ones are left out."""
    recipe = run.recipe
    chosen, strategy = recipe.select, STRATEGIES[recipe.select.strategy]
    own = own_settings(chosen.strategy, chosen.settings)
    values: dict[str, Any] = {"strategy": chosen.strategy, "settings": own, "seed": recipe.seed}
    if not strategy.searches:
        return values
    if run.left_out:
        values["left_out"] = list(run.left_out)
    values |= {"search": search_settings(chosen.search, chosen.strategy), "bf16": run.bf16, **task_settings(run)}
    if strategy.needs_text:
        values["text"] = text_settings(run)
        if (tokens := chosen.search.text_tokens) != USUAL_TEXT:
            values["text_tokens"] = tokens
    if strategy.needs_training:
        trained = recipe.distill.what_counts(tokens=False)
        asked = {"questions": task_settings(run)} if recipe.distill.retrieval_share else {}
        values["distill"] = {"train": trained, **text_settings(run), **asked}
    return values


def search_settings(search: SearchSettings, strategy: str) -> SettingValues:
    """Settings that the data of a search depends on; only gradient strategies have steps."""
    judged = {"longest": search.longest, "questions": search.questions}
    if not STRATEGIES[strategy].gradient_loss:
        return judged
    return {**judged, "shortest": search.shortest, "batch_tokens": search.batch_tokens}


def evaluate_settings(run: Run) -> SettingValues:
    """Settings that scores depend on; answers are stored by the name of their task."""
    settings = run.recipe.evaluate.model_dump(mode="json", exclude={"batch_tokens", "documents", "dtype"})
    if (documents := run.recipe.evaluate.documents) != "any":
        settings["documents"] = documents
    if (dtype := run.recipe.evaluate.dtype_on(run.device.type)) != "float32":
        settings["dtype"] = dtype
    names = {name: task.model_dump(mode="json") for name, task in run.recipe.tasks.items()}
    asked = task_settings(run, run.recipe.evaluate.chat_template)
    return {"evaluate": settings, **asked, "tasks": names, "text": text_settings(run), **ends(run)}


def ends(run: Run) -> SettingValues:
    """Settings that generated answers depend on besides the model: the end tokens."""
    configs = run.teacher.config, SimpleNamespace(**run.teacher.generation())
    return {"end_tokens": end_tokens(run.tokenizer, *configs)}


def budget_settings(budget: Budget) -> SettingValues:
    """The budget in its canonical form, and the content of its costs."""
    return {"budget": str(budget), **({"costs": budget.costs.digest} if budget.costs else {})}


def plain(tasks: Iterable[TaskSettings]) -> list[SettingValues]:
    """Tasks as JSON values."""
    return [task.model_dump(mode="json") for task in tasks]


def read_settings(run: Run) -> Figures:
    """The identity of the text, and the seed of its order and of all draws from it."""
    return {"text": identity_of(run.corpus), "seed": run.recipe.seed}
