"""`flashmorph align`: the linear branches, which serve every plan."""

from flashmorph.cli.app import app
from flashmorph.cli.options import (
    DataOption,
    DeviceOption,
    FromOption,
    MixersOption,
    Options,
    OutputOption,
    RecipeOption,
    RepeatOption,
    SetOption,
    TeacherArgument,
    UnusedOption,
    WindowOption,
    open_run,
)


@app.command()
def align(
    teacher: TeacherArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    window: WindowOption = None,
    mixers: MixersOption = None,
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
    from flashmorph.pipeline.branches import run_align, run_transplant
    from flashmorph.pipeline.signal import run_teacher

    options = Options(
        teacher=teacher,
        output=output,
        recipe=recipe,
        changes=changes,
        data=data,
        others=others,
        allow_repeat=allow_repeat,
        device=device,
        window=window,
        mixers=mixers,
        allow_unused=allow_unused,
    )
    run = open_run(options, ["align"])
    host = run_transplant(run)
    run_teacher(run, host)
    run_align(run, host)
