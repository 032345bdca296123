"""The commands that choose layers."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from flashmorph.cli.app import app
from flashmorph.cli.conflicts import require_with
from flashmorph.cli.options import (
    OUT,
    BudgetOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    KeptRecipeOption,
    Options,
    SetOption,
    StrategyOption,
    TeacherArgument,
    UnusedOption,
    open_run,
)
from flashmorph.cli.tables import new_table
from flashmorph.errors import UserError, quoted
from flashmorph.files import write_json
from flashmorph.surface.outputs import PICTURE, claim_output, json_of, made_by
from flashmorph.units import byte_size

_CURVE = "select --curve"


class _ListsStrategies(TyperCommand):
    """A command whose help ends with every strategy; only then are they imported."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import inspect

        from flashmorph.selection import STRATEGIES

        lines = {name: (inspect.getdoc(strategy.run) or "").split("\n\n")[0] for name, strategy in STRATEGIES.items()}
        self.epilog = "Strategies:\n\n" + "\n\n".join(
            f"- `{name}`: {' '.join(line.split())}" for name, line in lines.items()
        )
        super().format_help(ctx, formatter)


@app.command(cls=_ListsStrategies)
def select(
    ctx: typer.Context,
    teacher: TeacherArgument,
    source: Annotated[Path, typer.Option("--from", help="The run whose alignment is used; the search is kept there.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan (or the curve), a JSON file.")],
    recipe: KeptRecipeOption = None,
    budget: BudgetOption = None,
    strategy: StrategyOption = None,
    curve: Annotated[bool, typer.Option("--curve", help="Plan, loss and recall for every budget.")] = False,
    within: Annotated[str, typer.Option(help="With --curve: how much of the teacher's recall may be lost.")] = "5%",
    recall_questions: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="With --curve: generated answers a task.")
    ] = 50,
    max_plans: Annotated[int | None, typer.Option(help="With `exhaustive`: how many plans may be run.")] = None,
    changes: SetOption = None,
    allow_unused: UnusedOption = False,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Choose the layers that stay full, on a run that is aligned; or see with --curve what each budget would give.

    The run's own recipe is taken unless --recipe is given; what else is given changes it.

    Example: `flashmorph select tiny --from runs/demo --budget 3 --strategy greedy-forward --output plan.json`

    Example: `flashmorph select tiny --from runs/demo --curve --within 5% --output curve.json`
    """
    from flashmorph import distributed
    from flashmorph.pipeline.branches import run_align, run_transplant
    from flashmorph.pipeline.morph import run_select
    from flashmorph.selection import STRATEGIES

    if not curve:
        require_with(ctx, "--curve", "--within", "--recall-questions")
    share = _share(within)
    _claim(output, curve, force)
    if max_plans is not None:
        changes = [*(changes or []), f"select.settings.max_plans={max_plans}"]
    options = Options(
        teacher=teacher,
        output=source,
        recipe=recipe,
        budget=budget,
        changes=changes,
        strategy=strategy,
        device=device,
        json=as_json,
        recipe_of=(source,),
        allow_unused=allow_unused,
    )
    if not (source / "stages").is_dir():
        raise UserError(f"{source} is no run of flashmorph's: run `flashmorph align {teacher} --output {source}` first")
    run = open_run(options, ["align", "select"], keep_recipe=False)
    host = run_transplant(run)
    branches = run_align(run, host)
    if curve:
        _show_curve(run, host, branches, recall_questions, share, output, as_json)
        return
    plan = run_select(run, host, branches)
    if distributed.is_first():
        write_json(output, {**made_by("select"), **plan.to_dict()})
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
        return
    OUT.print(f"{plan.strip()}  {plan.unit} {plan.in_short()} stay full; written: {output}", soft_wrap=True)
    if STRATEGIES[plan.strategy].finds_budget:
        _show_what_it_found(run, plan)


def _claim(output: Path, curve: bool, force: bool) -> None:
    """Refuse files that are not ours to replace, the curve's picture as well."""
    claim_output(output, json_of(_CURVE if curve else "select"), force)
    if not curve:
        return
    if output.suffix == ".png":
        raise UserError(f"{output} would be the curve's picture; give the name of a JSON file, the picture lies beside")
    claim_output(output.with_suffix(".png"), PICTURE, force)


def _share(text: str) -> float:
    """`5%` as a share."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 <= share < 1:
        raise UserError(f"--within {quoted(text)} must be a percentage from 0% to below 100%, for example 5%")
    return share


def _show_curve(run: Any, host: Any, branches: Any, questions: int, share: float, output: Path, as_json: bool) -> None:
    """A line a budget, the smallest one within `share` of the teacher's recall marked."""
    from flashmorph import distributed
    from flashmorph.pipeline.curve import curve_in_vllm, draw_curve, figures_in_vllm, run_curve

    curve = run_curve(run, host, branches, questions)
    enough = curve.smallest_within(share)
    vllm = curve_in_vllm(run, curve)
    found = {"smallest_within": enough.num_full, "vllm": vllm and figures_in_vllm(curve, vllm)}
    values = {**curve.to_dict(), "within": share, **found}
    picture = output.with_suffix(".png")
    if distributed.is_first():
        write_json(output, {**made_by(_CURVE), **values})
        draw_curve(curve, share, picture)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    context = max(enough.cache_bytes, key=int)
    columns = ("full", "plan", "loss", "recall", f"cache at {int(context):,}", "")
    table = new_table(f"{curve.strategy}, before distillation", *columns, left=("plan", ""))
    for point in curve.points:
        note = f"<- smallest within {share:.0%}" if point is enough else ""
        figures = (f"{point.loss:.3f}", f"{point.recall:.0%}", byte_size(point.cache_bytes[context]), note)
        table.add_row(str(point.num_full), point.strip, *figures)
    OUT.print(table)
    if vllm:
        _show_vllm(curve, vllm, context)
    OUT.print(f"written: {output} and {picture}", highlight=False, soft_wrap=True)


def _show_vllm(curve: Any, caches: Any, context: str) -> None:
    """The same budgets in vLLM, a table of its own: beside the plans it would not fit."""
    from flashmorph.hosts.vllm_cache import unpadded

    columns = ("full", "layers of a group", "padded layers", f"cache at {int(context):,}")
    table = new_table("the same in vLLM", *columns, left=())
    for point, cache in zip(curve.points, caches, strict=True):
        groups = cache.groups
        allocated = byte_size(cache.sequence_bytes(int(context)))
        table.add_row(str(point.num_full), str(groups.size), str(groups.padded), allocated)
    OUT.print(table)
    counts = ", ".join(map(str, unpadded(len(curve.points))))
    OUT.print(f"vLLM pads no layer with {counts} full ones.", highlight=False, soft_wrap=True)


def _show_what_it_found(run: Any, plan: Any) -> None:
    """Cache saved against perplexity added, and where the full layers stand."""
    from flashmorph.pipeline.curve import saved_cache

    (context, saved), layers = saved_cache(run, plan), len(plan.assignments)
    thirds = [sum(3 * layer // layers == third for layer in plan.full_layers) for third in range(3)]
    OUT.print(
        f"{len(plan.full_groups)} of {layers} stay full: {saved:.0%} of the cache at {context:,} tokens is saved; "
        f"full layers: {thirds[0]} early, {thirds[1]} middle, {thirds[2]} late",
        highlight=False,
        soft_wrap=True,
    )
