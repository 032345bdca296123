"""The commands of the path: `morph`, and each of its stages."""

import json
from typing import Annotated

import typer
from rich.text import Text

from flashmorph.cli.app import app
from flashmorph.cli.options import (
    ERR,
    EVERY_STAGE,
    OUT,
    BudgetOption,
    DataOption,
    DeviceOption,
    FromOption,
    JsonOption,
    LayersOption,
    Options,
    OutputOption,
    PlanOption,
    RecipeOption,
    RepeatOption,
    SetOption,
    StrategyOption,
    TeacherArgument,
    UnusedOption,
    WindowOption,
    fitted,
    open_run,
    quiet,
    recipe_of,
)
from flashmorph.errors import UserError
from flashmorph.terminal import harmless


@app.command()
def morph(
    teacher: TeacherArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    budget: BudgetOption = None,
    strategy: StrategyOption = None,
    plan: PlanOption = None,
    layers: LayersOption = None,
    window: WindowOption = None,
    baseline: Annotated[str | None, typer.Option(help="`uniform`: train the uniform layout as well.")] = None,
    data: DataOption = None,
    allow_repeat: RepeatOption = False,
    allow_unused: UnusedOption = False,
    others: FromOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print stages, tokens and data; spend nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """From a teacher to a hybrid checkpoint with its evidence: every stage, one after the other.

    The same command again continues where it stopped. Nothing that is finished is run again or overwritten.

    Example: `flashmorph morph Qwen/Qwen3-1.7B --budget 7 --output qwen3-1.7b-hybrid`
    """
    options = Options(
        teacher,
        output,
        recipe,
        budget,
        changes,
        data,
        others,
        allow_repeat,
        strategy,
        baseline,
        device,
        as_json,
        window,
        plan,
        layers,
        allow_unused=allow_unused,
    )
    stages = [stage for stage in EVERY_STAGE if stage != "select" or not (plan or layers)]
    if dry_run:
        _dry_run(options, stages)
        return
    from flashmorph import pipeline

    run = open_run(options, stages)
    results = pipeline.morph(run)
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
        return
    run.screen.show(results)
    for name in ("recall_hybrid_undistilled_minus_uniform", "recall_hybrid_minus_uniform"):
        if difference := results.to_dict().get(name):
            low, high = difference["interval"]
            about = "before distillation" if "undistilled" in name else "after"
            OUT.print(
                f"recall minus uniform's {about}: {100 * difference['difference']:+.1f} points "
                f"({100 * low:+.1f} to {100 * high:+.1f})",
                highlight=False,
            )
    OUT.print(f"written: {output} (open it with AutoModelForCausalLM.from_pretrained)", highlight=False, soft_wrap=True)
    OUT.print(f"what it kept, lost and won: {output / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def transplant(
    teacher: TeacherArgument,
    output: OutputOption,
    changes: SetOption = None,
    allow_unused: UnusedOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Move a teacher into its host, all layers full, with the same logits; nothing else.

    Works without a tokenizer. OUTPUT must be new or empty. `--set host.NAME=VALUE` changes a setting of the host.

    Example: `flashmorph transplant Qwen/Qwen3-0.6B --output qwen3-as-host`
    """
    from flashmorph.devices import pick_device
    from flashmorph.hosts import configure
    from flashmorph.outputs import claim_folder
    from flashmorph.progress import silent
    from flashmorph.publish import write_host
    from flashmorph.recipe import parse_changes
    from flashmorph.teacher import load_config, open_teacher

    quiet()
    claim_folder(output)
    source = open_teacher(teacher)
    source.tokenizer()
    given = parse_changes(changes or [])
    if other := [key for key in given if not key.startswith("host.")]:
        raise UserError(f"--set {other[0]}: transplant has settings of the host only, --set host.NAME=VALUE")
    settings = {key.removeprefix("host."): value for key, value in given.items()}
    host, config = configure(load_config(source.folder), settings)
    with ERR.status(Text(harmless(f"moving {teacher}"))):
        record = write_host(source, output, settings, pick_device(device), silent, allow_unused)
    for notice in filter(None, (source.note, *record["notices"])):
        ERR.print(notice, highlight=False, soft_wrap=True)
    OUT.print(
        f"{output}: {host.name}, all {config.num_hidden_layers} layers full; {record['summary']}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def align(
    teacher: TeacherArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    window: WindowOption = None,
    data: DataOption = None,
    allow_repeat: RepeatOption = False,
    allow_unused: UnusedOption = False,
    others: FromOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a linear branch beside every attention (after `transplant`); it serves every plan.

    Example: `flashmorph align tiny --output runs/tiny`
    """
    from flashmorph import pipeline

    options = Options(
        teacher,
        output,
        recipe,
        None,
        changes,
        data,
        others,
        allow_repeat,
        device=device,
        window=window,
        allow_unused=allow_unused,
    )
    run = open_run(options, ["align"])
    host = pipeline.run_transplant(run)
    pipeline.run_teacher(run, host)
    pipeline.run_align(run, host)


def _dry_run(options: Options, stages: list[str]) -> None:
    """Stages, tokens and data of a run that is not started."""
    from rich.table import Table

    from flashmorph.given import given_plan
    from flashmorph.outlook import check, outlook, training_contexts
    from flashmorph.preflight import preflight
    from flashmorph.screen import RichScreen
    from flashmorph.teacher import load_config, open_teacher

    quiet()
    recipe = recipe_of(options)
    teacher = open_teacher(options.teacher)
    config = load_config(teacher.folder)
    recipe = fitted(recipe, config, RichScreen(ERR if options.json else OUT).say)
    check(teacher, recipe)
    plan = given_plan(teacher.name, config, recipe, options.plan, options.layers)
    if tokenizer := teacher.tokenizer():
        preflight(recipe, tokenizer, config, stages)
    rows = outlook(teacher.name, config, recipe, given=plan is not None)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{options.teacher} -> {options.output}", title_justify="left")
    contexts = training_contexts(config, recipe)
    for column in ("stage", "tokens", "length", "mean context", "data"):
        table.add_column(column, justify="left" if column in ("stage", "data") else "right")
    for row in rows:
        tokens = "as it goes" if row["tokens"] is None else f"{row['tokens']:,}" if row["tokens"] else ""
        _, context = contexts.get(row["stage"], (None, ""))
        table.add_row(row["stage"], tokens, str(row["length"] or ""), context, row["data"])
    OUT.print(table)


def _finish_until(last: str, options: Options) -> None:
    """The path up to `build`, `distill` or `extend` for a plan that is given, or selected first."""
    from flashmorph import pipeline, ranks
    from flashmorph.publish import bring

    stages = ["align", *([] if options.plan or options.layers else ["select"])]
    run = open_run(options, [*stages, *{"build": [], "distill": ["distill"]}.get(last, ["distill", "extend"])])
    host = pipeline.run_transplant(run)
    if not run.given:
        pipeline.run_teacher(run, host)
    branches = pipeline.run_align(run, host)
    chosen = run.given or pipeline.run_select(run, host, branches)
    stage = pipeline.run_build(run, host, branches, chosen, "")
    if last != "build":
        stage = pipeline.run_distill(run, host, stage, "")
    if last == "extend" and run.recipe.extend:
        stage = pipeline.run_extend(run, stage, "")
    if stage.folder.is_relative_to(run.folder.path):
        # Tokenizer and templates may have been edited since: they are no part of what the stage computed.
        ranks.first(lambda: bring(run.teacher.folder, stage.folder / "model"))
    OUT.print(f"checkpoint: {stage.folder / 'model'}", highlight=False, soft_wrap=True)


def _stage_command(last: str, text: str) -> None:
    """Register `build`, `distill` or `extend`: the same options, another last stage."""

    def command(
        teacher: TeacherArgument,
        output: OutputOption,
        recipe: RecipeOption = None,
        budget: BudgetOption = None,
        strategy: StrategyOption = None,
        plan: PlanOption = None,
        layers: LayersOption = None,
        window: WindowOption = None,
        data: DataOption = None,
        allow_repeat: RepeatOption = False,
        allow_unused: UnusedOption = False,
        others: FromOption = None,
        changes: SetOption = None,
        device: DeviceOption = "auto",
    ) -> None:
        options = Options(
            teacher,
            output,
            recipe,
            budget,
            changes,
            data,
            others,
            allow_repeat,
            strategy,
            device=device,
            window=window,
            plan=plan,
            layers=layers,
            allow_unused=allow_unused,
        )
        _finish_until(last, options)

    command.__doc__ = f"{text}\n\nExample: `flashmorph {last} tiny --output runs/tiny --layers 2,5`"
    app.command(last)(command)


_stage_command("build", "Write a plan as a plain checkpoint, before any distillation.")
_stage_command("distill", "Build a plan and train it towards the teacher's distribution.")
_stage_command("extend", "Build a plan, distil it and train it at a longer context.")
