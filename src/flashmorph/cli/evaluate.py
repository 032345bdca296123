"""The command that judges finished models, side by side."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from flashmorph.cli.app import app
from flashmorph.cli.conflicts import require_with
from flashmorph.cli.evaluate_tables import show_figures
from flashmorph.cli.options import (
    ERR,
    OUT,
    DeviceOption,
    ForceOption,
    JsonOption,
    Options,
    SetOption,
    UnusedOption,
    names,
    numbers,
    quiet,
    recipe_of,
)
from flashmorph.errors import UserError
from flashmorph.surface.outputs import PAGE, claim_output

_STYLES = ("lines", "ruler")


@app.command()
def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(help="Folders that flashmorph wrote, or teachers.", metavar="MODEL...")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Whose tasks, text and lengths: `demo`, `laptop`, `default`, `chat` or a YAML file. Default: that of "
            "`--report`'s run, else of the first model that came with one, else `demo`."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Also ask a recall grid at these context lengths, in tokens: `256,512`.", metavar="N,N..."),
    ] = None,
    depths: Annotated[int, typer.Option(min=1, max=1_000, help="The grid's depths, from the start to the end.")] = 5,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Questions a task; in the grid a task and length. Default: the recipe's; in the grid 200.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Dtype of the models. Default: the recipe's `evaluate.dtype`, which is usually float32 on a CPU "
            "and the checkpoint's own elsewhere."
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(
            help="How the grid asks: `ruler` (RULER's eleven synthetic tasks in its English) or `lines` (facts as "
            "lines, what the embedded teachers learned: in English they answer next to nothing). Default: `lines` for "
            "`tiny` and where the recipe says so, else `ruler`."
        ),
    ] = None,
    grid_tasks: Annotated[
        str | None,
        typer.Option(
            help="Of the grid's tasks only these, such as `niah_single_1,niah_multikey_1`. Default: all.",
            metavar="TASK,TASK...",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Also tasks of lm-evaluation-harness (extra `eval`), by name or YAML file: `arc_easy,my_task.yaml`.",
            metavar="TASK,TASK...",
        ),
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Also the loss of every further model minus the first's, by class of token."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Keep the figures in this run's folder (evaluate.json) and renew its report.html.", metavar="RUN"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Held-out text and haystacks: a file, a folder, or a dataset on the hub.")
    ] = None,
    changes: SetOption = None,
    allow_unused: UnusedOption = False,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Recall by generation and perplexity of models, side by side on the same questions and text.

    Every further model is compared with the first. With `--lengths` also a recall grid: RULER's tasks by context length
    and by the depth of the needle. All figures come with 95 % intervals (Wilson for recall, bootstrap for the rest,
    paired where two models are compared); the tables show the most important ones, `--json` has all.

    Example: `flashmorph evaluate tiny runs/demo --lengths 256,512 --report runs/demo`
    """
    from flashmorph.cli.screen import RichScreen
    from flashmorph.convert.teacher import EMBEDDED, locate
    from flashmorph.data.corpus import unread_of
    from flashmorph.devices import pick_device
    from flashmorph.evaluation.harness import Harness
    from flashmorph.pipeline.evaluate_models import Wanted, compare_models, fit_to_models, homes
    from flashmorph.recipe.recipe import with_settings
    from flashmorph.report import PAGE_NAME, claim_kept, keep, write_report

    if not lengths:
        require_with(ctx, "--lengths", "--depths", "--style", "--grid-tasks")
    quiet()
    if report:
        claim_kept(report, "evaluate", force)
        claim_output(report / PAGE_NAME, PAGE, force)
    options = Options(
        teacher="",
        output=Path(),
        recipe=recipe,
        changes=changes,
        data=data,
        recipe_of=(report,) if report else homes(models),
    )
    kept = options.kept_recipe
    chosen = recipe or kept or ("demo" if any(name in EMBEDDED for name in models) else None)
    settings = recipe_of(replace(options, recipe=str(chosen or "demo")))
    given = {"evaluate.questions": questions, "evaluate.dtype": dtype}
    settings = with_settings(settings, {name: value for name, value in given.items() if value})
    if style not in (None, *_STYLES):
        raise UserError(f"--style {style!r} must be {' or '.join(_STYLES)}")
    asked = style or ("lines" if chosen and settings.style == "lines" else "ruler")
    settings, notice = fit_to_models(models, settings, pick_device(device))
    for line in (notice, *unread_of(settings.data.corpus)):
        if line:
            RichScreen(ERR).say(line)
    only = names("--grid-tasks", grid_tasks) if grid_tasks else []
    grid = _grid_settings(lengths, only, depths, questions, asked, settings.evaluate) if lengths else None
    harness = (
        Harness(names("--tasks", tasks), {"max_seq_lengths": list(grid.lengths)} if grid else None) if tasks else None
    )
    wanted = Wanted(settings, grid, harness, tokens, allow_unused)
    if kept:
        RichScreen(ERR if as_json else OUT).say(f"recipe: {kept} (--recipe takes another)")
    elif not chosen:
        about = "demo, which asks in the lines that the embedded teachers know; --recipe default asks in English"
        RichScreen(ERR if as_json else OUT).say(f"recipe: {about}, --data gives the text")
    figures = compare_models(models, wanted, pick_device(device), RichScreen(ERR))
    written = ""
    if report:
        kept_in = keep(report, "evaluate", {"models": figures}, {name: locate(name)[0] for name in figures})
        written = f"written: {kept_in} and {write_report(report, force=force)}"
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        show_figures(OUT, figures)
    if written:
        (ERR if as_json else OUT).print(written, soft_wrap=True)


def _grid_settings(lengths: str, tasks: list[str], depths: int, questions: int | None, style: str, evaluate: Any):
    from flashmorph.evaluation import GridSettings
    from flashmorph.inputs.readyaml import sentence

    given: dict[str, Any] = {"lengths": numbers("--lengths", lengths), "tasks": tasks, "depths": depths, "style": style}
    given |= {"batch_tokens": evaluate.tokens_at_once, "chat_template": evaluate.chat_template}
    try:
        return GridSettings.model_validate(given | ({"questions": questions} if questions else {}))
    except ValidationError as error:
        raise UserError(sentence(error, GridSettings)) from error
