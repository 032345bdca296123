"""The budget curve: the plan for every number of full layers, and its recall before distillation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.files import write_json
from flashmorph.hosts import cache_by_context, cache_bytes, configure
from flashmorph.hosts.vllm_cache import VllmCache, vllm_cache
from flashmorph.inputs.shapes import Count, Finite, Shape, read_as
from flashmorph.model.morphable import Morphable
from flashmorph.pipeline.signal import with_signal
from flashmorph.plan import FULL, Budget, Group, Plan, Space
from flashmorph.progress import Report
from flashmorph.records import Figures
from flashmorph.run.digests import ends, select_settings, task_settings
from flashmorph.run.folder import Stage
from flashmorph.run.models import open_morphable, open_objective, run_search
from flashmorph.run.recall import PlanRecall, dtype_of_recall
from flashmorph.run.run import Run
from flashmorph.selection import STRATEGIES, Selection
from flashmorph.selection.search import reuse_of
from flashmorph.surface.outputs import save_picture
from flashmorph.units import longest_context


@dataclass(frozen=True)
class Point:
    """One budget: the plan, its mean answer loss in nats on validation questions, recall, and bytes of cache."""

    assignments: dict[Group, str]
    strip: str
    loss: float
    recall: float
    cache_bytes: dict[str, int]

    @property
    def num_full(self) -> int:
        """The number of full groups."""
        return sum(option == FULL for option in self.assignments.values())


class _Point(Shape):
    """`Point` as JSON."""

    model_config = ConfigDict(extra="forbid")
    assignments: Annotated[dict[str, str], Field(min_length=1)]
    strip: str
    loss: Finite
    recall: Finite
    cache_bytes: Annotated[dict[str, Count], Field(min_length=1)]


class _Curve(Shape):
    """`Curve` as JSON."""

    strategy: str
    points: Annotated[list[_Point], Field(min_length=1)]


@dataclass(frozen=True)
class Curve:
    """`points[k]` keeps k + 1 layers full; the last one is the teacher."""

    strategy: str
    points: list[Point]

    def smallest_within(self, share: float) -> Point:
        """The point with the fewest full layers whose recall is at least `1 - share` of the teacher's."""
        least = (1 - share) * self.points[-1].recall
        return next(point for point in self.points if point.recall >= least)

    def to_dict(self) -> Figures:
        """The JSON form."""
        return asdict(self)


def budget_curve(run: Run, morphable: Morphable, questions: int, folder: Path, report: Report) -> Curve:
    """Plans of the recipe's strategy for every count of full layers; `questions` generated answers a task for each.

    One search serves all counts if the strategy's scores allow it; else there is one search for each.

    Raises:
        UserError: the strategy cannot spend a count of layers.
    """
    strategy = run.recipe.select.strategy
    by_head = Budget.parse(run.recipe.budget).counts_heads
    space = morphable.space(Budget("heads" if by_head else "layers", 1))
    plans = [*find_plans(run, morphable, space, folder, report), space.plan(space.groups, space.count(1))]
    objective = open_objective(run, morphable, folder / "curve", evaluations=folder / "evaluations")
    losses = objective.evaluate(plans).mean(1)
    recalls = PlanRecall(run, morphable, "validation", run.recipe.seed, questions, folder)
    points = []
    for number, (plan, loss) in enumerate(zip(plans, losses, strict=True), 1):
        recall = distributed.first(lambda plan=plan: recalls.of(plan))
        config = morphable.host.with_plan(morphable.model.config, list(plan.assignments.values()))
        points.append(Point(plan.assignments, plan.strip(), float(loss), recall, cache_by_context(config)))
        report(number, len(plans), recall=recall)
    return Curve(strategy, points)


def find_plans(run: Run, morphable: Morphable, space: Space, folder: Path, report: Report) -> Sequence[Plan]:
    """The plan for each count of full layers from one to all but one."""
    recipe, strategy = run.recipe, run.recipe.select.strategy
    budgets = [space.count(kept) for kept in range(1, len(space.groups))]
    settings = dict(recipe.select.settings)
    record, reuse = STRATEGIES[strategy], reuse_of(strategy, settings)
    if reuse == "order" and len(space.options) > 2:
        reuse = "nothing"  # An order of layers has no options.
    if reuse == "order":
        settings |= record.order_settings

    def search(budget: Budget) -> Selection:
        state = folder / (f"{strategy}-{budget}" if reuse == "nothing" else strategy)
        chosen = recipe.select.model_copy(update={"settings": settings})
        own = replace(run, recipe=recipe.model_copy(update={"select": chosen}))
        return run_search(own, morphable, budget, state, report, folder / "evaluations")

    if reuse in ("nothing", "state"):
        return [search(budget).plan for budget in budgets]
    # What adds layer after layer must add them all to have an order for all.
    scores = search(budgets[-1 if record.order_from == "most" else 0]).scores
    return [replace(space.best(scores, budget), strategy=strategy, seed=recipe.seed) for budget in budgets]


def run_curve(run: Run, host: Stage, branches: Stage, questions: int) -> Curve:
    """The budget curve of an aligned run, as a stage of its own.

    Raises:
        UserError: the strategy cannot spend a count of layers, or weights are sharded; or see `with_signal`.
    """
    if run.shards:
        raise UserError("a curve asks whole models for answers: go on with --set shard=false")
    run = with_signal(run, host, branches)
    recipe = run.recipe

    def work(folder: Path, report: Report) -> Figures:
        fitted = replace(run, recipe=run.at_once("curve", folder))
        curve = budget_curve(fitted, open_morphable(run, host, branches), questions, folder, report)
        if distributed.is_first():
            write_json(folder / "curve.json", curve.to_dict())
        return {"left_out": list(run.left_out), "summary": f"{len(curve.points)} budgets"}

    asked = [recipe.select.search.longest, recipe.select.search.questions, task_settings(run)]
    dtype = dtype_of_recall(run)
    stage_settings = {
        "format": 2,
        "questions": questions,
        "asked": asked,
        "bf16": run.bf16,
        **({} if dtype == torch.float32 else {"dtype": str(dtype)}),
        **ends(run),
        **select_settings(run),
    }
    stage = run.stage("curve", f"{recipe.select.strategy}, every budget", stage_settings, [branches.digest], work)
    values = read_as(stage.folder / "curve.json", _Curve)
    return Curve(values["strategy"], [Point(**point) for point in values["points"]])


def curve_in_vllm(run: Run, curve: Curve) -> list[VllmCache] | None:
    """The cache of each point in vLLM; None where that does not serve the run's host."""
    host, config = configure(run.teacher.config, run.recipe.host)
    plans = [list(point.assignments.values()) for point in curve.points]
    caches = [vllm_cache(host, host.with_plan(config, options), options) for options in plans]
    return [cache for cache in caches if cache] if all(caches) else None


def figures_in_vllm(curve: Curve, caches: Sequence[VllmCache]) -> list[Figures]:
    """The caches of `curve_in_vllm` as JSON, at the contexts of the curve's own."""
    return [
        {
            "full": point.num_full,
            "padded_layers": cache.groups.padded,
            "cache_bytes": {context: cache.sequence_bytes(int(context)) for context in point.cache_bytes},
        }
        for point, cache in zip(curve.points, caches, strict=True)
    ]


def saved_cache(run: Run, plan: Plan) -> tuple[int, float]:
    """The longest context at which caches are compared, and the share of the cache of one that `plan` saves there."""
    host, full = configure(run.teacher.config, run.recipe.host)
    hybrid = host.with_plan(full, list(plan.assignments.values()))
    context = int(longest_context([cache_by_context(full)]))
    return context, 1 - cache_bytes(hybrid, context) / cache_bytes(full, context)


def draw_curve(curve: Curve, within: float, path: Path) -> None:
    """Recall and loss before distillation, and cache, against the number of full layers; a PNG."""
    from matplotlib.figure import Figure

    kept = [point.num_full for point in curve.points]
    teacher = curve.points[-1]
    context = max(teacher.cache_bytes, key=int)
    figure = Figure(figsize=(7, 6))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(kept, [100 * point.recall for point in curve.points], "o-", label="recall before distillation")
    top.axhline(100 * (1 - within) * teacher.recall, linestyle=":", color="grey", label=f"teacher's less {within:.0%}")
    share = [100 * point.cache_bytes[context] / teacher.cache_bytes[context] for point in curve.points]
    top.plot(kept, share, "s--", color="tab:green", label=f"cache at {int(context):,} tokens, of the teacher's")
    top.axvline(curve.smallest_within(within).num_full, linestyle=":", color="tab:red", label="smallest within it")
    top.set(ylabel="%", ylim=(0, 105))
    top.legend(fontsize=8)
    bottom.plot(kept, [point.loss for point in curve.points], "o-", color="tab:orange")
    bottom.set(xlabel="full layers", ylabel="answer loss, nats", yscale="log")
    for panel in (top, bottom):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    save_picture(figure, path, dpi=150)
