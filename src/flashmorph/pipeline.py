"""The whole path, top to bottom: transplant, align, select, build, distill, extend, evaluate, save.

Each stage reads an earlier stage's folder and writes its own (`runfolder.py`); the functions that do the work are the
library's own.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from flashmorph.card import model_card
from flashmorph.corpus import Corpus, Rows, pack
from flashmorph.devices import use_bf16
from flashmorph.errors import UserError
from flashmorph.evaluation import Score, evaluate, recall_difference
from flashmorph.files import read_json, write_json
from flashmorph.hosts import cache_bytes
from flashmorph.morphable import Morphable, attach, build
from flashmorph.move import transplant
from flashmorph.plan import Budget, Plan, Space
from flashmorph.progress import Report
from flashmorph.publish import publish, save_model
from flashmorph.recipe import Recipe
from flashmorph.runfolder import RunFolder, Stage, digest_of
from flashmorph.selection import NEED_TEXT
from flashmorph.selection.objective import MorphableObjective, SearchSettings
from flashmorph.selection.search import check_settings, select
from flashmorph.selection.uniform import uniform
from flashmorph.stages import TrainSettings, align, alignment_errors, distill, extend
from flashmorph.tasks import STYLES, Example, Haystack, Layout, TaskSettings, make_example
from flashmorph.teacher import Teacher, load_config, load_model

STAGES = ("transplant", "align", "select", "build", "distill", "extend", "evaluate")
CACHE_CONTEXTS = (512, 8192, 131072)
SEARCH_TEXT_TOKENS = 16_384


class Screen(Protocol):
    """What a person sees of a run."""

    def stage(self, name: str, about: str) -> AbstractContextManager[Report]:
        """A stage at work: its progress goes to the report."""
        ...

    def done(self, stage: Stage, about: str, figures: str) -> None:
        """A stage that is finished, or was already."""
        ...

    def say(self, text: str) -> None:
        """A line."""
        ...


@dataclass
class Run:
    """One `flashmorph morph`: what goes in, where it goes, and what shows it."""

    teacher: Teacher
    recipe: Recipe
    folder: RunFolder
    device: torch.device
    screen: Screen
    done: dict[str, Stage] = field(default_factory=dict)

    @property
    def corpus(self) -> Corpus:
        """The recipe's text."""
        return Corpus(self.recipe.data.source, self.recipe.data.config, self.recipe.data.column)

    @property
    def bf16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return use_bf16(self.device) if self.recipe.bf16 == "auto" else self.recipe.bf16

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer.

        Raises:
            UserError: it has none.
        """
        tokenizer = self.teacher.tokenizer()
        if tokenizer is None:
            raise UserError(f"{self.teacher.folder} has no tokenizer: only `flashmorph transplant` works without one")
        return tokenizer

    def stage(
        self, name: str, about: str, settings: Any, inputs: list[str], work: Callable[[Path, Report], dict | None]
    ) -> Stage:
        """Run one stage, or find that it is done, and show it."""
        label = f"{name} {about.split()[0]}" if name == "evaluate" or about.startswith("uniform") else name
        before = self.folder.last(label)
        if before and not self.folder.find(name, settings, inputs):
            self.screen.say(f"{label}: settings or inputs differ from {before}, which stays; running it again")
        set_seed(self.recipe.seed)
        with self.screen.stage(name, about) as report:
            stage = self.folder.run(name, settings, inputs, lambda folder: work(folder, report))
        self.folder.remember(label, stage)
        self.done[stage.digest] = stage
        self.screen.done(stage, about, stage.record.get("summary", ""))
        return stage


@dataclass
class Results:
    """What `morph` found: scores by model, and the stages that made them."""

    plan: Plan
    scores: dict[str, Score]
    stages: list[Stage]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, `results.json`."""
        values: dict[str, Any] = {name: score.to_dict() for name, score in self.scores.items()}
        if "uniform" in self.scores:
            for after in ("", "_undistilled"):
                difference = recall_difference(self.scores[f"hybrid{after}"], self.scores[f"uniform{after}"])
                values[f"recall_hybrid{after}_minus_uniform"] = difference
        values["layers"] = {"plan": self.plan.strip(), "full": self.plan.full_layers, "budget": str(self.plan.budget)}
        values["stages"] = [
            {name: stage.record.get(name) for name in ("stage", "digest", "seconds", "tokens")} for stage in self.stages
        ]
        return values


def check(teacher: Teacher, recipe: Recipe) -> None:
    """What can be known to fail before anything is written.

    Raises:
        UserError: a budget that leaves no choice, settings that the strategy does not have, a context longer than the
            teacher's, or a tokenizer that does not fit.
    """
    config = load_config(teacher.folder)
    budget = Budget.parse(recipe.budget)
    if budget.resource != "kv":
        Space.of_layers(config.num_hidden_layers).limit(budget)
    check_settings(recipe.select.strategy, recipe.select.settings)
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
    rows = [("transplant", 0, 0, f"{teacher.name}: a probe batch"), _cost_row("align", recipe.align, source, 1)]
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


def plan_from_file(run: Run, path: Path) -> Plan:
    """A plan that was saved before, for a teacher of the same shape.

    Raises:
        UserError: no plan, or one for another model.
    """
    plan = Plan.load(path)
    Space.of_layers(load_config(run.teacher.folder).num_hidden_layers).one_hot(plan)
    return plan


def plan_from_layers(run: Run, layers: str) -> Plan:
    """The plan that keeps these layers full: `1,2,6`.

    Raises:
        UserError: not a list of layer numbers, or all layers, or one that there is not.
    """
    try:
        numbers = sorted({int(number) for number in layers.split(",")})
    except ValueError as error:
        raise UserError(f"--layers {layers!r} must be layer numbers with commas, for example 1,2,6") from error
    space = Space.of_layers(load_config(run.teacher.folder).num_hidden_layers)
    budget = Budget("layers", len(numbers))
    space.limit(budget)
    return replace(space.plan([f"layers.{number}" for number in numbers], budget), teacher=run.teacher.name)


def morph(run: Run, plan: Plan | None = None) -> Results:
    """The whole path: a hybrid of the teacher with its evidence, published into the run's folder.

    With a `plan` nothing is selected.

    Raises:
        UserError: bad input, or a stage that cannot go on.
    """
    host = run_transplant(run)
    branches = run_align(run, host)
    plan = plan or run_select(run, host, branches)
    hybrid = finish(run, host, branches, plan, "")
    models = {"teacher": host, "hybrid_undistilled": hybrid["build"], "hybrid": hybrid["extend"]}
    if hybrid["extend"].name == "extend":
        models["hybrid_before_extend"] = hybrid["distill"]
    if run.recipe.baseline == "uniform":
        other = finish(run, host, branches, uniform_plan(run, host, plan), "uniform ")
        models |= {"uniform_undistilled": other["build"], "uniform": other["extend"]}
    scores = {name: run_evaluate(run, name, stage) for name, stage in models.items()}
    results = Results(plan, scores, list(run.done.values()))
    publish(run.folder.path, hybrid["extend"].folder, plan, results.to_dict(), run.recipe, model_card(run, results))
    return results


def finish(run: Run, host: Stage, branches: Stage, plan: Plan, label: str) -> dict[str, Stage]:
    """Build, distill and extend one plan; `extend` is the last stage, whatever the recipe leaves out."""
    built = run_build(run, host, branches, plan, label)
    distilled = run_distill(run, host, built, label)
    extended = run_extend(run, distilled, label) if run.recipe.extend else distilled
    return {"build": built, "distill": distilled, "extend": extended}


def run_transplant(run: Run) -> Stage:
    """Teacher to host, proven in float32, saved in the teacher's dtype."""

    def work(folder: Path, report: Report) -> dict[str, Any]:
        report(0, 3)
        teacher = run.teacher.load(torch.float32, run.device)
        report(1, 3)
        model, proof = transplant(teacher)
        report(2, 3)
        save_model(model, folder / "model", run.teacher.folder)
        summary = f"logits differ by at most {proof.difference:.1e} (allowed: {proof.tolerance:.1e})"
        return {"proof": proof.to_dict(), "summary": summary}

    return run.stage("transplant", run.teacher.name, {"format": 1}, [run.teacher.digest], work)


def run_align(run: Run, host: Stage) -> Stage:
    """A linear branch beside every attention, trained to give the attention's output."""
    settings = run.recipe.align

    def work(folder: Path, report: Report) -> dict[str, Any]:
        rows = training_rows(run, settings, "align", report)
        morphable, start = attach(open_host(run, host), calibration(run, rows))
        align(morphable, rows, settings, folder, run.recipe.seed, run.bf16, report)
        errors = alignment_errors(morphable, calibration(run, rows))
        save_file(morphable.branch_state(), folder / "branches.safetensors")
        summary = f"relative error by layer {_listed(start)} at the start, {_listed(errors)} now"
        tokens = settings.steps * settings.batch_rows * settings.length
        return {"errors_at_start": start, "errors": errors, "tokens": tokens, "summary": summary}

    wanted = {**_training(run, settings), "calibration_rows": run.recipe.calibration_rows}
    return run.stage("align", f"{settings.tokens:,} tokens", wanted, [host.digest], work)


def run_select(run: Run, host: Stage, branches: Stage) -> Plan:
    """Which layers stay full, by the recipe's strategy."""
    recipe, chosen = run.recipe, run.recipe.select

    def work(folder: Path, report: Report) -> dict[str, Any]:
        morphable = open_morphable(run, host, branches)
        objective = open_objective(run, morphable, folder, report)
        found = select(morphable, recipe.budget, chosen.strategy, objective, recipe.seed, **chosen.settings)
        replace(found.plan, teacher=run.teacher.name, revision=run.teacher.revision).save(folder / "plan.json")
        write_json(folder / "trace.json", found.trace)
        tokens = found.cost.tokens_forward + found.cost.tokens_backward
        return {"cost": found.cost.to_dict(), "tokens": tokens, "summary": found.plan.strip()}

    wanted = {
        "budget": recipe.budget,
        "select": chosen.model_dump(mode="json"),
        "tasks": _plain(recipe.tasks.values()),
        "style": recipe.style,
        **_common(run),
    }
    stage = run.stage("select", f"{chosen.strategy}, budget {recipe.budget}", wanted, [branches.digest], work)
    return Plan.load(stage.folder / "plan.json")


def open_objective(
    run: Run, morphable: Morphable, folder: Path, report: Report, search: SearchSettings | None = None
) -> MorphableObjective:
    """What the recipe's search asks of the model; its state and evaluated plans are kept in `folder`."""
    recipe, style = run.recipe, STYLES[run.recipe.style]
    layouts = {
        split: Layout(run.tokenizer, style, Haystack(run.corpus.pool(split, recipe.seed)))
        for split in ("train", "validation")
    }
    tasks, search = list(recipe.tasks.values()), search or recipe.select.search
    text = None
    if recipe.select.strategy in NEED_TEXT:
        rows = held_out_rows(run, "validation", search.longest, max(1, SEARCH_TEXT_TOKENS // search.longest))
        text = torch.tensor([rows[row]["input_ids"] for row in range(len(rows))])
    return MorphableObjective(morphable, layouts, style, tasks, search, folder, recipe.seed, run.bf16, report, text)


def uniform_plan(run: Run, host: Stage, plan: Plan) -> Plan:
    """The layout at regular intervals with as many full layers as `plan`."""
    budget = Budget("layers", len(plan.full_groups))
    space = Morphable(open_host(run, host)).space(budget)
    return replace(uniform(space, budget, None, 0).plan, strategy="uniform", teacher=run.teacher.name)


def run_build(run: Run, host: Stage, branches: Stage, plan: Plan, label: str) -> Stage:
    """The plan as a plain checkpoint of the host's class."""

    def work(folder: Path, report: Report) -> dict[str, Any]:
        report(0, 1)
        morphable = open_morphable(run, host, branches)
        save_model(build(morphable, plan), folder / "model", host.folder / "model")
        return {"summary": plan.strip()}

    about = f"{label}{len(plan.full_groups)} of {len(plan.assignments)} layers full"
    return run.stage("build", about, plan.assignments, [branches.digest], work)


def run_distill(run: Run, host: Stage, built: Stage, label: str) -> Stage:
    """The hybrid learns the teacher's distribution on text."""
    settings = run.recipe.distill

    def work(folder: Path, report: Report) -> dict[str, Any]:
        rows = training_rows(run, settings, "distill", report)
        student, teacher = open_stage(run, built), open_host(run, host)
        distill(student, teacher, rows, settings, folder, run.recipe.seed, run.bf16, report)
        save_model(student, folder / "model", built.folder / "model")
        return {"tokens": settings.steps * settings.batch_rows * settings.length, "summary": _last_loss(folder, "KL")}

    about = f"{label}{settings.tokens:,} tokens of length {settings.length:,}"
    return run.stage("distill", about, _training(run, settings), [built.digest], work)


def run_extend(run: Run, distilled: Stage, label: str) -> Stage:
    """Next-token training at a longer context."""
    settings = run.recipe.extend
    assert settings

    def work(folder: Path, report: Report) -> dict[str, Any]:
        rows = training_rows(run, settings, "extend", report)
        model = open_stage(run, distilled)
        extend(model, rows, settings, folder, run.recipe.seed, run.bf16, report)
        save_model(model, folder / "model", distilled.folder / "model")
        return {"tokens": settings.steps * settings.batch_rows * settings.length, "summary": _last_loss(folder, "loss")}

    about = f"{label}{settings.tokens:,} tokens of length {settings.length:,}"
    return run.stage("extend", about, _training(run, settings), [distilled.digest], work)


def run_evaluate(run: Run, label: str, model: Stage) -> Score:
    """Recall by generation, perplexity and cache of one model, on the test split."""
    recipe, settings = run.recipe, run.recipe.evaluate

    def work(folder: Path, report: Report) -> dict[str, Any]:
        loaded = open_stage(run, model)
        questions = open_questions(recipe, run.corpus, run.tokenizer)
        rows = max(1, settings.perplexity_tokens // settings.length)
        held_out = held_out_rows(run, "test", settings.length, rows)
        score = evaluate(loaded, run.tokenizer, questions, held_out, settings, cache_of(loaded), report)
        write_json(folder / "right.json", score.right)
        summary = f"recall {100 * score.recall:.1f} %, perplexity {score.perplexity:.2f}"
        return {"perplexity": score.perplexity, "cache_bytes": score.cache_bytes, "summary": summary}

    wanted = {
        "evaluate": settings.model_dump(mode="json"),
        "tasks": _plain(recipe.tasks.values()),
        "style": recipe.style,
        **_common(run),
    }
    stage = run.stage("evaluate", label, wanted, [model.digest], work)
    record = stage.record
    return Score(read_json(stage.folder / "right.json"), record["perplexity"], record["cache_bytes"])


def open_questions(recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, Sequence[Example]]:
    """The recipe's questions of the test split, by task."""
    style, settings = STYLES[recipe.style], recipe.evaluate
    layout = Layout(tokenizer, style, Haystack(corpus.pool("test", recipe.seed)))
    return {
        name: [
            make_example(task, layout, style, "test", settings.length, recipe.seed, number)
            for number in range(settings.questions)
        ]
        for name, task in recipe.tasks.items()
    }


def cache_of(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of cache of one sequence, by context length."""
    return {str(context): cache_bytes(model.config, context) for context in CACHE_CONTEXTS}


def open_stage(run: Run, stage: Stage) -> PreTrainedModel:
    """The model that a stage saved, in float32: training keeps its master weights in it and casts by itself."""
    return load_model(stage.folder / "model", torch.float32, run.device)


def open_host(run: Run, host: Stage) -> PreTrainedModel:
    """The transplanted teacher, all layers full."""
    return open_stage(run, host)


def open_morphable(run: Run, host: Stage, branches: Stage) -> Morphable:
    """The host with its aligned branches."""
    morphable = Morphable(open_host(run, host))
    morphable.load_branch_state(load_file(branches.folder / "branches.safetensors"))
    return morphable


def training_rows(run: Run, settings: TrainSettings, stage: str, report: Report) -> Rows:
    """Rows for one stage, tokenised once into the run's data folder: text, and retrieval questions where asked for."""
    recipe = run.recipe
    questions = round(settings.retrieval_share * settings.rows)
    tasks = list(recipe.tasks.values()) if questions else []
    wanted = {"train": [settings.length, settings.rows], **_common(run), "questions": [questions, recipe.style]}
    path = run.folder.data / f"{stage}-{digest_of([run.teacher.digest, wanted, _plain(tasks)])}.npy"
    rows: list[list[int]] = []
    if questions and not path.exists():
        layout = Layout(run.tokenizer, STYLES[recipe.style], Haystack(run.corpus.pool("train", recipe.seed)))
        for number in range(questions):
            task = tasks[number % len(tasks)]
            style, length = STYLES[recipe.style], settings.length
            rows.append(make_example(task, layout, style, "train", length, recipe.seed, number).input_ids)
            report(number + 1, questions)
    passes = recipe.data.max_passes
    return pack(
        run.corpus, run.tokenizer, "train", settings.length, settings.rows, recipe.seed, path, passes, report, rows
    )


def held_out_rows(run: Run, split: str, length: int, rows: int) -> Rows:
    """Text that no stage trains on, repeated where there is too little of it."""
    path = run.folder.data / f"{split}-{digest_of([run.teacher.digest, length, rows, _common(run)])}.npy"
    return pack(run.corpus, run.tokenizer, split, length, rows, run.recipe.seed, path, None)


def calibration(run: Run, rows: Rows) -> torch.Tensor:
    """The rows that branches are started from, `[rows, length]`."""
    return torch.tensor([rows[row]["input_ids"] for row in range(min(run.recipe.calibration_rows, len(rows)))])


def _cost_row(name: str, settings: TrainSettings, source: str, times: int) -> tuple[str, int, int, str]:
    return name, settings.tokens * times, settings.length, source + (f", {times} plans" if times > 1 else "")


def _common(run: Run) -> dict[str, Any]:
    return {"data": run.recipe.data.model_dump(mode="json"), "seed": run.recipe.seed, "bf16": run.bf16}


def _training(run: Run, settings: TrainSettings) -> dict[str, Any]:
    wanted = {"train": settings.model_dump(mode="json"), **_common(run)}
    if settings.retrieval_share:
        wanted |= {"tasks": _plain(run.recipe.tasks.values()), "style": run.recipe.style}
    return wanted


def _plain(tasks: Iterable[TaskSettings]) -> list[dict[str, Any]]:
    return [task.model_dump(mode="json") for task in tasks]


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values)


def _last_loss(folder: Path, name: str) -> str:
    lines = (folder / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines[-10:]]
    return f"{name} {sum(losses) / len(losses):.3f} nats a token"
