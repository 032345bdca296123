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
    from flashmorph.pipeline.morph import run_until

    if last == "extend" and not recipe_of(options).extend:
        raise UserError(
            "this recipe switches the extension off (`extend: null`): give --set extend.tokens=... with "
            "--set extend.length=..., or stop with `flashmorph distill`"
        )
    stages = ["align", *([] if options.plan or options.layers else ["select"])]
    run = open_run(options, [*stages, *{"build": [], "distill": ["distill"]}.get(last, ["distill", "extend"])])
    stage = run_until(run, last)
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
