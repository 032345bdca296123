"""The commands. Each calls the same functions as the library; see `pipeline.py` for the path itself."""

import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from flashmorph.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a trained Transformer cheap on long contexts: keep full attention in the few layers that need it.",
)
_out, _err = Console(), Console(stderr=True)

TeacherArgument = Annotated[
    str, typer.Argument(help="`tiny`, a local folder, or a model on the hub.", metavar="TEACHER")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; continues what is there.")]
RecipeOption = Annotated[
    str | None, typer.Option(help="`demo`, `default` or a YAML file. Default: `demo` for `tiny`, else `default`.")
]
BudgetOption = Annotated[
    str | None, typer.Option(help="What may stay full: `7`, `25%` or `kv=64MiB@32768`. Default: the recipe's.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting of the recipe: `align.tokens=1000000`.")
]
DataOption = Annotated[
    str | None, typer.Option(help="Text to train on: a file, a folder, or a dataset on the hub (streamed).")
]
FromOption = Annotated[list[Path] | None, typer.Option("--from", help="Another run whose finished stages may be used.")]
RepeatOption = Annotated[bool, typer.Option("--allow-repeat", help="Let stages repeat the text more than 4 times.")]
StrategyOption = Annotated[str | None, typer.Option(help="How layers are chosen.")]
PlanOption = Annotated[Path | None, typer.Option(help="Build this plan instead of selecting one.")]
LayersOption = Annotated[str | None, typer.Option(help="Keep these layers full instead of selecting: `1,2,6`.")]
DeviceOption = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `mps`.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")
]


@dataclass
class Options:
    """What every command that works on a run is given."""

    teacher: str
    output: Path
    recipe: str | None = None
    budget: str | None = None
    changes: list[str] | None = None
    data: str | None = None
    others: list[Path] | None = None
    allow_repeat: bool = False
    strategy: str | None = None
    baseline: str | None = None
    device: str = "auto"
    json: bool = False


@app.command()
def morph(
    teacher: TeacherArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    budget: BudgetOption = None,
    strategy: StrategyOption = None,
    plan: PlanOption = None,
    layers: LayersOption = None,
    baseline: Annotated[str | None, typer.Option(help="`uniform`: train the uniform layout as well.")] = None,
    data: DataOption = None,
    allow_repeat: RepeatOption = False,
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
        teacher, output, recipe, budget, changes, data, others, allow_repeat, strategy, baseline, device, as_json
    )
    if dry_run:
        _dry_run(options)
        return
    from flashmorph import pipeline

    run = _open(options)
    results = pipeline.morph(run, _given_plan(run, plan, layers))
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
        return
    run.screen.show(results)
    for name in ("recall_hybrid_undistilled_minus_uniform", "recall_hybrid_minus_uniform"):
        if difference := results.to_dict().get(name):
            low, high = difference["interval"]
            about = "before distillation" if "undistilled" in name else "after"
            _out.print(
                f"recall minus uniform's {about}: {100 * difference['difference']:+.1f} points "
                f"({100 * low:+.1f} to {100 * high:+.1f})",
                highlight=False,
            )
    _out.print(
        f"written: {output} (open it with AutoModelForCausalLM.from_pretrained)", highlight=False, soft_wrap=True
    )


@app.command()
def transplant(teacher: TeacherArgument, output: OutputOption, device: DeviceOption = "auto") -> None:
    """Move a teacher into its host, all layers full, with the same logits; nothing else.

    Works without a tokenizer. OUTPUT must be new or empty.

    Example: `flashmorph transplant Qwen/Qwen3-0.6B --output qwen3-as-host`
    """
    import torch

    from flashmorph.devices import pick_device
    from flashmorph.move import transplant as move
    from flashmorph.publish import claim_empty, save_model
    from flashmorph.teacher import open_teacher

    _quiet()
    claim_empty(output)
    source = open_teacher(teacher)
    source.tokenizer()
    with _err.status(f"moving {teacher}"):
        model, proof = move(source.load(torch.float32, pick_device(device)))
        if output.is_dir():
            output.rmdir()
        save_model(model, output, source.folder)
    _out.print(
        f"{output}: {type(model).__name__}, all {model.config.num_hidden_layers} layers full; logits differ by at most "
        f"{proof.difference:.1e} ({proof.tolerance:.1e} is allowed)",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def align(
    teacher: TeacherArgument,
    output: OutputOption,
    recipe: RecipeOption = None,
    data: DataOption = None,
    allow_repeat: RepeatOption = False,
    others: FromOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a linear branch beside every attention (after `transplant`); it serves every plan.

    Example: `flashmorph align tiny --output runs/tiny`
    """
    from flashmorph import pipeline

    options = Options(teacher, output, recipe, None, changes, data, others, allow_repeat, device=device)
    run = _open(options)
    pipeline.run_align(run, pipeline.run_transplant(run))


class _ListsStrategies(TyperCommand):
    """A command whose help ends with every strategy; only then are they imported."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import inspect

        from flashmorph.selection import STRATEGIES

        modules = {name: inspect.getmodule(strategy) for name, strategy in STRATEGIES.items()}
        lines = {name: (module.__doc__ or "").split("\n\n")[0] for name, module in modules.items() if module}
        self.epilog = "Strategies:\n\n" + "\n\n".join(
            f"- `{name}`: {' '.join(line.split())}" for name, line in lines.items()
        )
        super().format_help(ctx, formatter)


@app.command(cls=_ListsStrategies)
def select(
    teacher: TeacherArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a JSON file.")],
    source: Annotated[Path, typer.Option("--from", help="The run whose alignment is used; the search is kept there.")],
    recipe: RecipeOption = None,
    budget: BudgetOption = None,
    strategy: StrategyOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Choose the layers that stay full, on a run that is aligned.

    Example: `flashmorph select tiny --from runs/demo --budget 3 --strategy greedy-forward --output plan.json`
    """
    from flashmorph import pipeline

    if recipe is None and (source / "stages").is_dir():
        recipe = str(_kept_recipe(source)) if _kept_recipe(source).is_file() else None
    options = Options(teacher, source, recipe, budget, changes, strategy=strategy, device=device)
    if not (source / "stages").is_dir():
        raise UserError(f"{source} is no run of flashmorph's: run `flashmorph align {teacher} --output {source}` first")
    run = _open(options)
    host = pipeline.run_transplant(run)
    plan = pipeline.run_select(run, host, pipeline.run_align(run, host))
    plan.save(output)
    _out.print(f"{plan.strip()}  layers {', '.join(map(str, plan.full_layers))} stay full; written: {output}")


def _finish_until(last: str, options: Options, plan: Path | None, layers: str | None) -> None:
    """The path up to `build`, `distill` or `extend` for a plan that is given, or selected first."""
    from flashmorph import pipeline

    run = _open(options)
    host = pipeline.run_transplant(run)
    branches = pipeline.run_align(run, host)
    chosen = _given_plan(run, plan, layers) or pipeline.run_select(run, host, branches)
    stage = pipeline.run_build(run, host, branches, chosen, "")
    if last != "build":
        stage = pipeline.run_distill(run, host, stage, "")
    if last == "extend" and run.recipe.extend:
        stage = pipeline.run_extend(run, stage, "")
    _out.print(f"checkpoint: {stage.folder / 'model'}", highlight=False, soft_wrap=True)


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
        data: DataOption = None,
        allow_repeat: RepeatOption = False,
        others: FromOption = None,
        changes: SetOption = None,
        device: DeviceOption = "auto",
    ) -> None:
        options = Options(teacher, output, recipe, budget, changes, data, others, allow_repeat, strategy, device=device)
        _finish_until(last, options, plan, layers)

    command.__doc__ = f"{text}\n\nExample: `flashmorph {last} tiny --output runs/tiny --layers 2,5`"
    app.command(last)(command)


_stage_command("build", "Write a plan as a plain checkpoint, before any distillation.")
_stage_command("distill", "Build a plan and train it towards the teacher's distribution.")
_stage_command("extend", "Build a plan, distil it and train it at a longer context.")


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Folders that flashmorph wrote, or teachers.", metavar="MODEL...")
    ],
    recipe: Annotated[str, typer.Option(help="Whose tasks and lengths: `demo`, `default` or a YAML file.")] = "demo",
    data: DataOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Recall by generation and perplexity of models, side by side on the same questions.

    Example: `flashmorph evaluate tiny runs/demo --recipe demo --set evaluate.questions=200`
    """
    from flashmorph.devices import pick_device
    from flashmorph.judge import score_model

    _quiet()
    settings = _recipe(Options("", Path(), recipe, None, changes, data))
    figures = {}
    for model in models:
        with _err.status(f"evaluating {model}"):
            figures[model] = score_model(model, settings, pick_device(device)).to_dict()
        if not as_json:
            score = figures[model]
            tasks = ", ".join(
                f"{task} {100 * value['recall']:.0f} %" for task, value in score["recall_by_task"].items()
            )
            _out.print(
                f"{model}: recall {100 * score['recall']:.1f} % ({tasks}), perplexity {score['perplexity']:.3f}",
                highlight=False,
                soft_wrap=True,
            )
    if as_json:
        print(json.dumps(figures, indent=2))


@app.command()
def generate(
    models: Annotated[list[str], typer.Argument(help="Folders or teachers.", metavar="MODEL...")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt with several models, side by side (greedy, with the cache).

    Example: `flashmorph generate tiny runs/demo --prompt "@ file class:482139"`
    """
    from flashmorph.devices import pick_device
    from flashmorph.judge import continue_prompt

    _quiet()
    for model in models:
        text = continue_prompt(model, prompt, max_new_tokens, pick_device(device))
        _out.rule(model, align="left")
        _out.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Versions, devices, and which kernels will be used and why. Add its output to a bug report.

    Example: `flashmorph env`
    """
    from flashmorph.environment import describe

    _quiet()
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        _out.print(f"{name:<24} {value}", highlight=False, soft_wrap=True)


def _quiet() -> None:
    """No library's own notices and bars between ours."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    for name in ("accelerate", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _recipe(options: Options) -> Any:
    """The recipe that a command's options make."""
    from flashmorph.recipe import load_recipe, parse_changes
    from flashmorph.teacher import EMBEDDED

    changes = parse_changes(options.changes or [])
    given = {"budget": options.budget, "select.strategy": options.strategy, "baseline": options.baseline}
    changes |= {key: value for key, value in given.items() if value is not None}
    if options.data:
        changes |= {"data.source": options.data, "data.config": None}
    if options.allow_repeat:
        changes["data.max_passes"] = None
    return load_recipe(options.recipe or ("demo" if options.teacher in EMBEDDED else "default"), changes)


def _open(options: Options) -> Any:
    """The run: recipe, teacher, device and folder, checked in this order, so that bad input harms nothing."""
    from flashmorph.devices import pick_device
    from flashmorph.pipeline import Run, check
    from flashmorph.runfolder import RunFolder
    from flashmorph.screen import RichScreen
    from flashmorph.teacher import open_teacher

    _quiet()
    screen = RichScreen(_err if options.json else _out)
    recipe = _recipe(options)
    teacher = open_teacher(options.teacher)
    if teacher.note:
        screen.say(teacher.note)
    device = pick_device(options.device)
    check(teacher, recipe)
    return Run(teacher, recipe, RunFolder(options.output, tuple(options.others or [])), device, screen)


def _given_plan(run: Any, plan: Path | None, layers: str | None) -> Any:
    """The plan of `--plan` or `--layers`, or None."""
    from flashmorph.pipeline import plan_from_file, plan_from_layers

    if plan and layers:
        raise UserError("give --plan or --layers, not both")
    if plan:
        return plan_from_file(run, plan)
    return plan_from_layers(run, layers) if layers else None


def _kept_recipe(run: Path) -> Path:
    return run / "recipe.yaml"


def _dry_run(options: Options) -> None:
    """Stages, tokens and data of a run that is not started."""
    from rich.table import Table

    from flashmorph.pipeline import check, outlook
    from flashmorph.teacher import open_teacher

    _quiet()
    recipe = _recipe(options)
    teacher = open_teacher(options.teacher)
    check(teacher, recipe)
    rows = outlook(teacher, recipe)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{options.teacher} -> {options.output}", title_justify="left")
    for column in ("stage", "tokens", "length", "data"):
        table.add_column(column, justify="left" if column in ("stage", "data") else "right")
    for row in rows:
        table.add_row(
            row["stage"], f"{row['tokens']:,}" if row["tokens"] else "", str(row["length"] or ""), row["data"]
        )
    _out.print(table)


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        _err.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _err.print("interrupted; the same command again goes on from here")
        sys.exit(130)


def _plain(text: str) -> str:
    return " ".join(text.replace("[", r"\[").split())


if __name__ == "__main__":
    main()
