"""The whole path, top to bottom: transplant, teacher, align, signal, select, build, distill, extend, evaluate, save,
report.

Each stage reads an earlier stage's folder and writes its own (`run/folder.py`); the functions that do the work are the
library's own. Several processes go through it together: a stage's work is shared, or the first does it `alone`
(`distributed.py`).
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from flashmorph import distributed
from flashmorph.convert.load import load_config
from flashmorph.convert.save import bring, save_model
from flashmorph.errors import UserError
from flashmorph.evaluation import RangeLosses, Score, evaluate
from flashmorph.files import write_json
from flashmorph.hosts import cache_by_context, host_of, layer_space
from flashmorph.inputs.shapes import Count, Shape, read_as, require_shape
from flashmorph.model.sharding import shard_morphable
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.pipeline.card import model_card
from flashmorph.pipeline.publish import publish
from flashmorph.pipeline.signal import run_teacher, with_signal
from flashmorph.pipeline.timing import run_timing
from flashmorph.pipeline.training import run_distill, run_extend
from flashmorph.plan import Plan
from flashmorph.progress import Report
from flashmorph.recipe.given import require_fits, space_of_run
from flashmorph.recipe.questions import open_questions
from flashmorph.records import Figures
from flashmorph.report import write_report
from flashmorph.run.data import held_out_text
from flashmorph.run.digests import budget_settings, evaluate_settings, select_settings
from flashmorph.run.folder import Stage
from flashmorph.run.models import open_answering, open_morphable, open_sharded, run_search
from flashmorph.run.pools import Pools
from flashmorph.run.run import Results, Run
from flashmorph.selection import BASELINE, STRATEGIES
from flashmorph.selection.search import plan_without_search


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
        require_fits(run.given, space_of_run(run.teacher.config, run.recipe, run.given), "the plan")
    host, branches, plan = choose(run)
    hybrid = finish(run, host, branches, plan)
    timing = run_timing(run, host, hybrid["build"], plan)
    models = {"teacher": host, "hybrid_undistilled": hybrid["build"], "hybrid": hybrid["extend"]}
    if hybrid["extend"].name == "extend":
        models["hybrid_before_extend"] = hybrid["distill"]
    if run.recipe.baseline:
        other = finish(run, host, branches, baseline_plan(run, host, plan), BASELINE)
        models |= {f"{BASELINE}_undistilled": other["build"], BASELINE: other["extend"]}
    scores = {name: run_evaluate(run, name, stage) for name, stage in models.items()}
    teacher, timed = run.teacher, dict(timing) if timing else None
    results = Results(plan, scores, list(run.done.values()), timed, teacher.name, teacher.revision)

    def leave_behind() -> None:
        folder, model = run.folder.path, hybrid["extend"].folder
        card = model_card(run, results)
        publish(folder, model, run.teacher.folder, plan, results.to_dict(), run.recipe, card)
        write_report(folder, force=True)  # A run's own folder holds what runs publish.

    distributed.first(leave_behind)
    return results


def run_until(run: Run, last: str) -> Stage:
    """The path up to `last`, which is `build`, `distill` or `extend`, without evaluation; `model/` has the checkpoint.

    Raises:
        UserError: bad input, or a stage that cannot go on.
    """
    host, branches, plan = choose(run)
    stage = run_build(run, host, branches, plan)
    run_timing(run, host, stage, plan)
    if last != "build":
        stage = run_distill(run, host, stage)
    if last == "extend":
        stage = run_extend(run, stage)
    if stage.folder.is_relative_to(run.folder.path):
        # Tokenizer and templates may have been edited since: they are no part of what the stage computed.
        distributed.first(lambda: bring(run.teacher.folder, stage.folder / "model"))
    return stage


def choose(run: Run) -> tuple[Stage, Stage, Plan]:
    """The host, the aligned branches, and the plan: the one that is given, else that of the recipe's search."""
    host = run_transplant(run)
    if not run.given:
        run_teacher(run, host)
    branches = run_align(run, host)
    return host, branches, run.given or run_select(run, host, branches)


def finish(run: Run, host: Stage, branches: Stage, plan: Plan, layout: str = "") -> dict[str, Stage]:
    """Build, distill and extend one plan; `extend` is the last stage, whatever the recipe leaves out.

    `layout` names a plan beside the run's own, `uniform`, in the labels of its stages and on the console.
    """
    built = run_build(run, host, branches, plan, layout)
    distilled = run_distill(run, host, built, layout)
    extended = run_extend(run, distilled, layout) if run.recipe.extend else distilled
    return {"build": built, "distill": distilled, "extend": extended}


def run_select(run: Run, host: Stage, branches: Stage) -> Plan:
    """Which layers stay full, by the recipe's strategy.

    Raises:
        UserError: see `with_signal`; or the strategy trains whole models and weights are sharded.
    """
    chosen, strategy = run.recipe.select, STRATEGIES[run.recipe.select.strategy]
    if run.shards and (strategy.needs_training or strategy.patches):
        does = "trains whole models" if strategy.needs_training else "replaces activations inside of the model"
        raise UserError(f"strategy {chosen.strategy} {does}: go on with --set shard=false")
    budget = run.budget()
    run = with_signal(run, host, branches)
    recipe = run.recipe

    def work(folder: Path, report: Report) -> Figures:
        morphable = open_sharded(run, lambda: open_morphable(run, host, branches), shard_morphable)
        fitted = replace(run, recipe=run.at_once("select", folder))
        found = run_search(fitted, morphable, budget, folder, report)
        if distributed.is_first():
            replace(found.plan, teacher=run.teacher.name, revision=run.teacher.revision).save(folder / "plan.json")
            write_json(folder / "trace.json", found.trace)
            # The trained hybrids of its paths, each as large as the model: their losses are kept apart from them.
            shutil.rmtree(folder / "distilled", ignore_errors=True)
        tokens = found.cost.tokens_forward + found.cost.tokens_backward
        figures = {"cost": found.cost.to_dict(), "tokens": tokens, "left_out": list(run.left_out)}
        time = f", {budget.costs.of(found.plan.assignments) / 1000:,.3f} ms by the costs" if budget.costs else ""
        return {**figures, "summary": f"{found.plan.strip()}{time}"}

    spent = {} if strategy.finds_budget else budget_settings(budget)
    about = chosen.strategy if strategy.finds_budget else f"{chosen.strategy}, budget {recipe.budget}"
    stage = run.stage("select", about, {**spent, **select_settings(run)}, [branches.digest], work)
    return Plan.load(stage.folder / "plan.json")


def baseline_plan(run: Run, host: Stage, plan: Plan) -> Plan:
    """The baseline's plan with as many full layers as `plan`."""
    config = load_config(host.folder / "model")
    space = layer_space(host_of(config), config, plan.granularity)
    budget = space.count(len(plan.full_groups))
    plain = plan_without_search(BASELINE, space, budget)
    return replace(plain, teacher=run.teacher.name, revision=run.teacher.revision)


def run_build(run: Run, host: Stage, branches: Stage, plan: Plan, layout: str = "") -> Stage:
    """The plan as a plain checkpoint of the host's class; `layout` as in `finish`."""

    def work(folder: Path, report: Report) -> Figures:
        report(0, 1)
        morphable = open_morphable(run, host, branches)
        # In the dtype that is saved: a copy in float32 would be the largest thing in memory of the whole run.
        dtype = load_config(host.folder / "model").dtype or torch.float32
        save_model(morphable.instantiate(plan, dtype, shared=True), folder / "model", host.folder / "model")
        return {"summary": plan.strip()}

    about = f"{layout} {len(plan.full_groups)} of {len(plan.assignments)} {plan.unit} full".strip()
    label = f"build {layout}".strip()
    return run.stage("build", about, plan.assignments, [branches.digest], work, alone=True, label=label)


def run_evaluate(run: Run, name: str, model: Stage) -> Score:
    """Recall by generation, perplexity and cache of the run's model `name`, on the test split."""
    recipe = run.recipe

    def work(folder: Path, report: Report) -> Figures:
        settings = run.at_once("evaluate", folder).evaluate
        loaded = open_answering(run, model, settings.dtype_on(run.device.type))
        questions = open_questions(recipe, Pools(run), run.tokenizer)
        text = held_out_text(run, "test", settings.length, settings.perplexity_tokens, settings.takes_long_documents)
        score = evaluate(loaded, run.tokenizer, questions, text, settings, cache_by_context(loaded.config), report)
        if distributed.is_first():
            write_json(folder / "right.json", score.right)
            write_json(folder / "text.json", asdict(score.text))
        summary = f"recall {100 * score.recall:.1f} %, perplexity {score.perplexity:.2f}"
        return {
            "perplexity": score.perplexity,
            "perplexity_text": score.text_read,
            "cache_bytes": score.cache_bytes,
            "summary": summary,
        }

    wanted, label = evaluate_settings(run), f"evaluate {name}"
    stage = run.stage("evaluate", name, wanted, [model.digest], work, label=label)
    require_shape(stage.record, _Evaluated, str(stage.folder / "stage.json"))
    right = read_as(stage.folder / "right.json", dict[str, list[bool]])
    text = RangeLosses.load(stage.folder / "text.json")
    return Score(right, stage.record["perplexity"], stage.record["cache_bytes"], text)
