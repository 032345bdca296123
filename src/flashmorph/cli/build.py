"""`flashmorph build`, `distill` and `extend`: the same options, another last stage."""

from flashmorph.cli.app import app
from flashmorph.cli.options import (
    OUT,
    BudgetOption,
    DataOption,
    DeviceOption,
    FromOption,
    LayersOption,
    MixersOption,
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
    open_run,
    recipe_of,
)
from flashmorph.errors import UserError


def _finish_until(last: str, options: Options) -> None:
    """The path up to `build`, `distill` or `extend` for a plan that is given, or selected first."""
    from flashmorph import distributed
    from flashmorph.convert.save import bring
    from flashmorph.pipeline.branches import run_align, run_transplant
    from flashmorph.pipeline.morph import run_build, run_select
    from flashmorph.pipeline.signal import run_teacher
    from flashmorph.pipeline.timing import run_timing
    from flashmorph.pipeline.training import run_distill, run_extend

    if last == "extend" and not recipe_of(options).extend:
        raise UserError(
            "this recipe switches the extension off (`extend: null`): give --set extend.tokens=... with "
            "--set extend.length=..., or stop with `flashmorph distill`"
        )
    stages = ["align", *([] if options.plan or options.layers else ["select"])]
    run = open_run(options, [*stages, *{"build": [], "distill": ["distill"]}.get(last, ["distill", "extend"])])
    host = run_transplant(run)
    if not run.given:
        run_teacher(run, host)
    branches = run_align(run, host)
    chosen = run.given or run_select(run, host, branches)
    stage = run_build(run, host, branches, chosen, "")
    run_timing(run, host, stage, chosen)
    if last != "build":
        stage = run_distill(run, host, stage, "")
    if last == "extend":
        stage = run_extend(run, stage, "")
    if stage.folder.is_relative_to(run.folder.path):
        # Tokenizer and templates may have been edited since: they are no part of what the stage computed.
        distributed.first(lambda: bring(run.teacher.folder, stage.folder / "model"))
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
        mixers: MixersOption = None,
        data: DataOption = None,
        allow_repeat: RepeatOption = False,
        allow_unused: UnusedOption = False,
        others: FromOption = None,
        changes: SetOption = None,
        device: DeviceOption = "auto",
    ) -> None:
        options = Options(
            teacher=teacher,
            output=output,
            recipe=recipe,
            budget=budget,
            changes=changes,
            data=data,
            others=others,
            allow_repeat=allow_repeat,
            strategy=strategy,
            device=device,
            window=window,
            mixers=mixers,
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
