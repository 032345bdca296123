"""Signal of tasks: if the teacher cannot answer one, a search on it chooses layers by noise.

Asked twice: of the teacher alone before `align` is paid for, and before a search of full attention against none of it,
on the search's own questions. Tasks without signal are left out of the search.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.evaluation import answers_right, paired_interval
from flashmorph.hosts.parts import decoder_of
from flashmorph.losses import Head, token_losses
from flashmorph.model.sharding import shard_morphable
from flashmorph.plan import Budget, Space
from flashmorph.progress import Report, silent
from flashmorph.recipe.outlook import goes_by_answers, signal_questions
from flashmorph.recipe.questions import open_questions
from flashmorph.records import Figures
from flashmorph.run.digests import ends, task_settings
from flashmorph.run.folder import Stage
from flashmorph.run.models import open_answering, open_morphable, open_objective, open_sharded
from flashmorph.run.pools import Pools
from flashmorph.run.run import Run
from flashmorph.selection.strategy import Objective
from flashmorph.tasks import Example

_REMEDY = (
    "ask what it can answer (tasks, style, a chat template, a shorter select.search.length), or go on with --set "
    "select.require_signal=false"
)


class Ability(TypedDict):
    """What the teacher does in one task: recall, loss in nats, the loss of guessed digits, and whether at chance."""

    recall: float
    loss: float
    guessing: float
    at_chance: bool


class Signal(TypedDict):
    """Answer loss of one task in nats with all layers `full` and none (`empty`), and the interval of the difference."""

    full: float
    empty: float
    interval: list[float]


def run_teacher(run: Run, host: Stage) -> Stage | None:
    """The teacher's own answers by task, as a stage; None if no search will use them.

    The questions are the first of each task in the search-validation split, as long as the search's longest.
    """
    recipe = run.recipe
    number, length = recipe.select.teacher_questions, recipe.select.search.longest
    if not goes_by_answers(recipe):
        return None

    dtype = recipe.evaluate.dtype_on(run.device.type)

    def work(folder: Path, report: Report) -> Figures:
        model = open_answering(run, host, dtype)
        questions = open_questions(
            recipe, Pools(run), run.tokenizer, "validation", number, length, recipe.chat_template
        )
        tokens = run.at_once("teacher", folder).evaluate.tokens_at_once
        by_task = ask_teacher(model, run.tokenizer, questions, tokens, report)
        at_chance = [name for name, figures in by_task.items() if figures["at_chance"]]
        if at_chance:
            run.screen.say(f"the teacher is at chance in {', '.join(at_chance)}: {_REMEDY}")
        return {"tasks": by_task, "at_chance": at_chance, "summary": ", ".join(map(_in_short, by_task.items()))}

    settings = {"questions": number, "length": length, "dtype": dtype, **ends(run), **task_settings(run)}
    about = f"{number} questions a task of {length:,} tokens"
    return run.stage("teacher", about, settings, [host.digest], work)


def ask_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, Sequence[Example]],
    batch_tokens: int = 16_384,
    report: Report = silent,
) -> dict[str, Ability]:
    """By task: `recall` (greedy generation), `loss` (mean cross-entropy of the last answer's tokens, in nats), that of
    `guessing` its digits, and whether the model is `at_chance`.

    At chance is a task in which no question is answered and the answers are no likelier than guessed digits: the paired
    95 % interval of the difference of the two losses reaches 0. Recall alone would not do: a teacher that knows the
    number and words its answer otherwise has a loss that a search can use.
    """
    by_task: dict[str, Ability] = {}
    for number, (name, examples) in enumerate(questions.items(), 1):
        right = answers_right(model, tokenizer, examples, batch_tokens)
        losses = distributed.spread(examples, lambda example: _answer_loss(model, example))
        guesses = [_guessing(example) for example in examples]
        low, _ = paired_interval([guesses], [losses])
        recall, loss, guessing = (float(np.mean(each)) for each in (right, losses, guesses))
        at_chance = not any(right) and low <= 0
        by_task[name] = {"recall": recall, "loss": loss, "guessing": guessing, "at_chance": at_chance}
        report(number, len(questions))
    return by_task


@torch.no_grad()
def _answer_loss(model: PreTrainedModel, example: Example) -> float:
    """Mean cross-entropy of the last answer's tokens, in nats."""
    ids = torch.tensor([example.input_ids], device=model.device)
    hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, example.prompt_tokens - 1 : -1]
    return token_losses(hidden, Head.of(model), ids[0, example.prompt_tokens :]).mean().item()


def _guessing(example: Example) -> float:
    """The same for a guess that knows the form of an answer and none of its digits; the first digit is not 0."""
    numbers = re.findall(r"\d+", example.answer)
    nats = sum(math.log(9) + (len(number) - 1) * math.log(10) for number in numbers)
    return nats / (len(example.input_ids) - example.prompt_tokens)


def _in_short(task: tuple[str, Ability]) -> str:
    name, figures = task
    chance = " (at chance)" if figures["at_chance"] else ""
    return f"{name} {100 * figures['recall']:.0f} % {figures['loss']:.2f} nats{chance}"


def with_signal(run: Run, host: Stage, branches: Stage) -> Run:
    """`run` for a search, without the tasks in which full attention makes no difference; these are reported.

    Nothing is measured if no search uses answers, or if the recipe does not require it.

    Raises:
        UserError: no task is left.
    """
    recipe = run.recipe
    if not goes_by_answers(recipe):
        return run
    record = run_signal(run, host, branches).record
    left_out = record["left_out"]
    if not left_out:
        return run
    differences = ", ".join(_difference(name, record["tasks"][name]) for name in left_out)
    if len(left_out) == len(recipe.tasks):
        raise UserError(
            "there is nothing to choose layers by: without any full layer the teacher answers no worse than with all "
            f"of them (answer loss, all switched less all full: {differences}): {_REMEDY}"
        )
    run.screen.say(f"left out of the search, as full attention makes no difference there: {differences}")
    tasks = {name: task for name, task in recipe.tasks.items() if name not in left_out}
    return replace(run, recipe=recipe.model_copy(update={"tasks": tasks}), left_out=tuple(left_out))


def run_signal(run: Run, host: Stage, branches: Stage) -> Stage:
    """The answer loss of the plan with all layers full and of that with none, by task, as a stage.

    The questions are the search's own, and further ones if it has fewer than `LEAST_QUESTIONS` a task.
    """
    recipe, search = run.recipe, run.recipe.select.search
    number = signal_questions(recipe)

    def work(folder: Path, report: Report) -> Figures:
        fitted = replace(run, recipe=run.at_once("signal", folder))
        search = fitted.recipe.select.search.model_copy(update={"questions": number})
        morphable = open_sharded(run, lambda: open_morphable(run, host, branches), shard_morphable)
        objective = open_objective(fitted, morphable, folder, search)
        by_task = measure_signal(list(recipe.tasks), morphable.space(Budget("layers", 1)), objective, report)
        left_out = [name for name, figures in by_task.items() if figures["interval"][0] <= 0]
        summary = ", ".join(_difference(name, figures) for name, figures in by_task.items())
        return {"tasks": by_task, "left_out": left_out, "summary": summary}

    settings = {"questions": number, "length": search.longest, "bf16": run.bf16, **task_settings(run)}
    return run.stage("signal", "answer loss, no layer full less all full", settings, [branches.digest], work)


def measure_signal(
    tasks: Sequence[str], space: Space, objective: Objective, report: Report = silent
) -> dict[str, Signal]:
    """By task: mean answer loss with all layers `full` and with none (`empty`), in nats, and the paired 95 % `interval`
    of the difference. The objective's questions belong to `tasks` in turn."""
    budget = Budget("layers", 1)
    plans = [space.plan(space.groups, budget), space.plan([], budget)]
    full, empty = objective.evaluate(plans, report=lambda share: report(share, 1))
    by_task: dict[str, Signal] = {}
    for index, name in enumerate(tasks):
        with_all, with_none = full[index :: len(tasks)], empty[index :: len(tasks)]
        interval = paired_interval([with_none], [with_all])
        by_task[name] = {"full": float(with_all.mean()), "empty": float(with_none.mean()), "interval": list(interval)}
    return by_task


def _difference(name: str, figures: Signal) -> str:
    low, high = figures["interval"]
    return f"{name} {figures['empty'] - figures['full']:+.2f} nats ({low:+.2f} to {high:+.2f})"
