"""The whole path, top to bottom: transplant, teacher, align, signal, select, build, distill, extend, evaluate, save,
report.

Each stage reads an earlier stage's folder and writes its own (`run/folder.py`); the functions that do the work are the
library's own. Several processes go through it together: a stage's work is shared, or the first does it `alone`
(`distributed.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from flashmorph import distributed
from flashmorph.convert.load import load_config, load_model
from flashmorph.convert.save import save_model, write_host
from flashmorph.convert.shards import is_whole
from flashmorph.data.isolation import how_apart
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.evaluation import RangeLosses, Score, evaluate
from flashmorph.files import atomic_path, write_json
from flashmorph.hosts import (
    cache_by_context,
    host_for,
    host_of,
    host_settings,
    layer_space,
    supports_varlen,
    with_branches_to_train,
)
from flashmorph.inputs.shapes import Count, Shape, read_as, require_shape
from flashmorph.model.morphable import Morphable, attach, build
from flashmorph.model.sharding import shard_morphable, shard_student, shard_teacher, whole
from flashmorph.pipeline.card import model_card
from flashmorph.pipeline.publish import publish
from flashmorph.pipeline.signal import run_teacher, with_signal
from flashmorph.plan import Budget, Plan
from flashmorph.progress import Report
from flashmorph.recipe.given import require_fits, space_of_run
from flashmorph.recipe.questions import open_questions
from flashmorph.records import Figures
from flashmorph.report import write_report
from flashmorph.run.data import calibration, held_out_text, training_rows
from flashmorph.run.digests import (
    budget_settings,
    evaluate_settings,
    logit_settings,
    select_settings,
    training_settings,
)
from flashmorph.run.folder import Stage
from flashmorph.run.models import divided, open_morphable, open_stage, run_search
from flashmorph.run.run import Results, Run
from flashmorph.selection import BASELINE, STRATEGIES
from flashmorph.selection.search import plan_without_search
from flashmorph.stages import (
    RowsWithLogits,
    TrainSettings,
    align,
    alignment_errors,
    distill,
    extend,
    logged,
    logits_on_disk,
    write_logits,
)


class _Evaluated(Shape):
    """What the record of `evaluate` has beside others'."""

    perplexity: float
    cache_bytes: dict[str, Count]


def morph(run: Run) -> Results:
    """The whole path: a hybrid of the teacher with its evidence, published into the run's folder.

    Raises:
        UserError: bad input, or a stage that cannot go on.
    """
    if run.given:
        require_fits(run.given, space_of_run(load_config(run.teacher.folder), run.recipe), "the plan")
    host = run_transplant(run)
    if not run.given:
        run_teacher(run, host)
    branches = run_align(run, host)
    plan = run.given or run_select(run, host, branches)
    hybrid = finish(run, host, branches, plan, "")
    models = {"teacher": host, "hybrid_undistilled": hybrid["build"], "hybrid": hybrid["extend"]}
    if hybrid["extend"].name == "extend":
        models["hybrid_before_extend"] = hybrid["distill"]
    if run.recipe.baseline:
        other = finish(run, host, branches, baseline_plan(run, host, plan), f"{BASELINE} ")
        models |= {f"{BASELINE}_undistilled": other["build"], BASELINE: other["extend"]}
    scores = {name: run_evaluate(run, name, stage) for name, stage in models.items()}
    results = Results(plan, scores, list(run.done.values()))

    def leave_behind() -> None:
        folder, model = run.folder.path, hybrid["extend"].folder
        card = model_card(run, results)
        publish(folder, model, run.teacher.folder, plan, results.to_dict(), run.recipe, card)
        write_report(folder, force=True)  # A run's own folder holds what runs publish.

    distributed.first(leave_behind)
    return results


def finish(run: Run, host: Stage, branches: Stage, plan: Plan, label: str) -> dict[str, Stage]:
    """Build, distill and extend one plan; `extend` is the last stage, whatever the recipe leaves out."""
    built = run_build(run, host, branches, plan, label)
    distilled = run_distill(run, host, built, label)
    extended = run_extend(run, distilled, label) if run.recipe.extend else distilled
    return {"build": built, "distill": distilled, "extend": extended}


def run_transplant(run: Run) -> Stage:
    """Teacher to host, proven in float32, saved in the teacher's dtype."""
    settings = host_settings(host_for(load_config(run.teacher.folder), run.recipe.host), run.recipe.host)

    def work(folder: Path, report: Report) -> Figures:
        return write_host(
            run.teacher, folder / "model", settings, run.device, report, run.allow_unused, over_folder=True
        )

    wanted = {"format": 1, **({"host": settings} if settings else {})}
    stage = run.stage("transplant", run.teacher.name, wanted, [run.teacher.digest], work, alone=True)
    for notice in stage.record.get("notices", []):
        run.screen.say(notice)
    return stage


def run_align(run: Run, host: Stage) -> Stage:
    """A linear branch beside every attention, trained to give the attention's output; windows need no training."""
    settings = run.recipe.align
    if not with_branches_to_train(host_of(load_config(host.folder / "model"))):
        return run.stage("align", "nothing: a window has no weights", {}, [host.digest], _no_branches, alone=True)

    def work(folder: Path, report: Report) -> Figures:
        settings = run.at_once("align", folder).align
        rows = training_rows(run, settings, "align", report)
        first = calibration(run, rows)
        start: list[float] = []

        def open_attached() -> Morphable:
            morphable, start[:] = attach(open_stage(run, host), first["input_ids"])
            return morphable

        morphable = divided(run, open_attached, shard_morphable)
        align(morphable, rows, settings, folder, run.recipe.seed, run.bf16, report, run.recipe.report_to)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16 and run.shards):
            errors = alignment_errors(morphable, **first)
        state = whole(morphable.branch_state())
        if distributed.is_first():
            with atomic_path(folder / "branches.safetensors") as temporary:
                save_file(state, temporary)
        worse = worse_than_silent(errors, len(morphable.layers))
        summary = f"relative error by layer {_listed(start)} at the start, {_listed(errors)} now"
        figures = {"errors_at_start": start, "errors": errors, "worse_than_silent": worse}
        return {**figures, **_trained(run, settings, rows), "summary": summary}

    wanted = {**training_settings(run, settings), "calibration_rows": run.recipe.calibration_rows}
    stage = run.stage("align", f"{settings.tokens:,} tokens", wanted, [host.digest], work)
    if worse := stage.record.get("worse_than_silent"):
        run.screen.say(warning(worse))
    return stage


def run_select(run: Run, host: Stage, branches: Stage) -> Plan:
    """Which layers stay full, by the recipe's strategy.

    Raises:
        UserError: see `with_signal`; or the strategy trains whole models and weights are divided.
    """
    chosen, strategy = run.recipe.select, STRATEGIES[run.recipe.select.strategy]
    if run.shards and strategy.needs_training:
        raise UserError(f"strategy {chosen.strategy} trains whole models: go on with --set shard=false")
    run = with_signal(run, host, branches)
    recipe = run.recipe

    def work(folder: Path, report: Report) -> Figures:
        morphable = divided(run, lambda: open_morphable(run, host, branches), shard_morphable)
        fitted = replace(run, recipe=run.at_once("select", folder))
        found = run_search(fitted, morphable, recipe.budget, folder, report)
        if distributed.is_first():
            replace(found.plan, teacher=run.teacher.name, revision=run.teacher.revision).save(folder / "plan.json")
            write_json(folder / "trace.json", found.trace)
        tokens = found.cost.tokens_forward + found.cost.tokens_backward
        figures = {"cost": found.cost.to_dict(), "tokens": tokens, "left_out": list(run.left_out)}
        return {**figures, "summary": found.plan.strip()}

    spent = {} if strategy.finds_budget else {"budget": budget_settings(run)}
    about = chosen.strategy if strategy.finds_budget else f"{chosen.strategy}, budget {recipe.budget}"
    stage = run.stage("select", about, {**spent, **select_settings(run)}, [branches.digest], work)
    return Plan.load(stage.folder / "plan.json")


def baseline_plan(run: Run, host: Stage, plan: Plan) -> Plan:
    """The baseline's plan with as many full layers as `plan`."""
    budget = Budget("layers", len(plan.full_groups))
    config = load_config(host.folder / "model")
    space = layer_space(host_of(config), config, budget)
    return replace(plan_without_search(BASELINE, space, budget), teacher=run.teacher.name)


def run_build(run: Run, host: Stage, branches: Stage, plan: Plan, label: str) -> Stage:
    """The plan as a plain checkpoint of the host's class."""

    def work(folder: Path, report: Report) -> Figures:
        report(0, 1)
        morphable = open_morphable(run, host, branches)
        save_model(build(morphable, plan), folder / "model", host.folder / "model")
        return {"summary": plan.strip()}

    about = f"{label}{len(plan.full_groups)} of {len(plan.assignments)} layers full"
    return run.stage("build", about, plan.assignments, [branches.digest], work, alone=True)


def run_distill(run: Run, host: Stage, built: Stage, label: str) -> Stage:
    """The hybrid learns the teacher's distribution on text."""
    settings = run.recipe.distill
    logits = run_logits(run, host, settings.teacher_logits.top_k) if settings.teacher_logits else None

    def work(folder: Path, report: Report) -> Figures:
        rows = training_rows(run, settings, "distill", report)
        if not _has_model(folder):
            train(folder, rows, report)
        return {**_trained(run, settings, rows), "summary": _last_loss(folder, "KL")}

    def train(folder: Path, rows: Rows, report: Report) -> None:
        settings = run.at_once("distill", folder).distill
        student = divided(run, lambda: open_stage(run, built), shard_student)
        teacher = None if logits else divided(run, lambda: open_stage(run, host), shard_teacher)
        given = RowsWithLogits(rows, logits.folder) if logits else rows
        distill(student, teacher, given, settings, folder, run.recipe.seed, run.bf16, report, run.recipe.report_to)
        save_model(student, folder / "model", built.folder / "model")

    about = f"{label}{settings.tokens:,} tokens of length {settings.length:,}"
    inputs = [built.digest, *([logits.digest] if logits else [])]
    return run.stage("distill", about, training_settings(run, settings), inputs, work)


def run_logits(run: Run, host: Stage, top_k: int) -> Stage:
    """The teacher's likeliest tokens on the rows of `distill`, for a teacher that does not fit beside its student."""
    settings = run.recipe.distill

    def work(folder: Path, report: Report) -> Figures:
        settings = run.at_once("logits", folder, alone=True).distill
        run.screen.say(f"logits: {logits_on_disk(settings, top_k)}, in {folder.parent}")
        rows = training_rows(run, settings, "distill", report)
        teacher = load_model(host.folder / "model", torch.float32, run.device)
        write_logits(teacher, rows, settings, top_k, folder, run.bf16, report)
        return {**_trained(run, settings, rows), "summary": logits_on_disk(settings, top_k)}

    about = f"the teacher's {top_k:,} likeliest next tokens"
    return run.stage("logits", about, logit_settings(run, settings, top_k), [host.digest], work, alone=True)


def run_extend(run: Run, distilled: Stage, label: str) -> Stage:
    """Next-token training at a longer context."""
    settings = run.recipe.extend
    assert settings

    def work(folder: Path, report: Report) -> Figures:
        rows = training_rows(run, settings, "extend", report)
        if not _has_model(folder):
            train(folder, rows, report)
        return {**_trained(run, settings, rows), "summary": _last_loss(folder, "loss")}

    def train(folder: Path, rows: Rows, report: Report) -> None:
        settings = run.at_once("extend", folder).extend
        assert settings
        model = divided(run, lambda: open_stage(run, distilled), shard_student)
        extend(model, rows, settings, folder, run.recipe.seed, run.bf16, report, run.recipe.report_to)
        save_model(model, folder / "model", distilled.folder / "model")

    about = f"{label}{settings.tokens:,} tokens of length {settings.length:,}"
    return run.stage("extend", about, training_settings(run, settings), [distilled.digest], work)


def run_evaluate(run: Run, label: str, model: Stage) -> Score:
    """Recall by generation, perplexity and cache of one model, on the test split."""
    recipe = run.recipe

    def work(folder: Path, report: Report) -> Figures:
        settings = run.at_once("evaluate", folder, alone=True).evaluate
        loaded = load_model(model.folder / "model", torch.float32, run.device)
        # The stage's copy of generation_config.json may be older than the teacher's.
        if ends := run.teacher.generation().get("eos_token_id"):
            loaded.generation_config.eos_token_id = ends
        questions = open_questions(recipe, run.corpus, run.tokenizer)
        text = held_out_text(run, "test", settings.length, settings.perplexity_tokens)
        score = evaluate(loaded, run.tokenizer, questions, text, settings, cache_by_context(loaded.config), report)
        write_json(folder / "right.json", score.right)
        assert score.text
        write_json(folder / "text.json", asdict(score.text))
        summary = f"recall {100 * score.recall:.1f} %, perplexity {score.perplexity:.2f}"
        return {
            "perplexity": score.perplexity,
            "perplexity_text": score.text_read,
            "cache_bytes": score.cache_bytes,
            "summary": summary,
        }

    stage = run.stage("evaluate", label, evaluate_settings(run), [model.digest], work, alone=True)
    require_shape(stage.record, _Evaluated, str(stage.folder / "stage.json"))
    right = read_as(stage.folder / "right.json", dict[str, list[bool]])
    text = RangeLosses.load(stage.folder / "text.json")
    return Score(right, stage.record["perplexity"], stage.record["cache_bytes"], text)


def worse_than_silent(errors: Sequence[float], layers: int) -> list[int]:
    """Layers one of whose branches has a relative error of 1 or more; `errors` has those of each layer in turn."""
    return sorted({place * layers // len(errors) for place, error in enumerate(errors) if not error < 1})


def warning(worse: list[int]) -> str:
    """What to say of layers that alignment leaves worse than silent."""
    numbers = ", ".join(map(str, worse))
    layers, them = (f"layers {numbers} are", "them") if len(worse) > 1 else (f"layer {numbers} is", "it")
    return (
        f"after alignment {layers} worse than a silent branch (relative error 1 or more): train longer, or with "
        f"another learning rate, before you trust a plan that switches {them}"
    )


def _has_model(folder: Path) -> bool:
    """Whether an interrupted stage had saved its model already."""
    return distributed.first(lambda: is_whole(folder / "model"))


def _no_branches(folder: Path, report: Report) -> Figures:
    save_file({}, folder / "branches.safetensors")
    return {"tokens": 0, "summary": "the attention itself looks through it"}


def _trained(run: Run, settings: TrainSettings, rows: Rows) -> Figures:
    """What a stage that trains says of its data."""
    host = host_for(load_config(run.teacher.folder), run.recipe.host)
    varlen = supports_varlen(host, run.device)
    documents = "long" if settings.takes_long_documents else how_apart(settings.keeps_apart, varlen)
    return {
        "tokens": settings.tokens_run,
        "documents": documents,
        "mean_context": rows.mean_context(settings.keeps_apart),
        "sharded": run.shards,
    }


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values)


def _last_loss(folder: Path, name: str) -> str:
    losses = [entry["loss"] for entry in logged(folder)[-10:]]
    return f"{name} {sum(losses) / len(losses):.3f} nats a token" if losses else f"{name} unknown: its log is gone"
