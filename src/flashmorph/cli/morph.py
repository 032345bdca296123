"""`flashmorph morph`: the whole path, and what it would be (`--dry-run`)."""

import json
from collections.abc import Collection
from typing import Annotated

import typer

from flashmorph.cli.app import app
from flashmorph.cli.conflicts import replaced_mixture
from flashmorph.cli.options import (
    ERR,
    OUT,
    BaselineOption,
    BudgetOption,
    DataOption,
    DeviceOption,
    FromOption,
    JsonOption,
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
    fitted,
    open_run,
    quiet,
    recipe_of,
)
from flashmorph.cli.tables import new_table


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
    mixers: MixersOption = None,
    baseline: BaselineOption = None,
    data: DataOption = None,
    allow_repeat: RepeatOption = False,
    allow_unused: UnusedOption = False,
    others: FromOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, tokens and data; spend nothing, read no weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """From a teacher to a hybrid checkpoint with its evidence: every stage, one after the other.

    The same command again continues where it stopped. Nothing that is finished is run again or overwritten.

    Example: `flashmorph morph Qwen/Qwen3-1.7B --budget 7 --output qwen3-1.7b-hybrid`
    """
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
        baseline=baseline,
        device=device,
        json=as_json,
        window=window,
        mixers=mixers,
        plan=plan,
        layers=layers,
        allow_unused=allow_unused,
    )
    from flashmorph.run.open import every_stage

    stages = every_stage(bool(plan or layers))
    if dry_run:
        _dry_run(options, stages)
        return
    from flashmorph.pipeline import morph as pipeline

    run = open_run(options, stages)
    results = pipeline.morph(run)
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
        return
    run.screen.show(results)
    OUT.print(f"written: {output} (open it with AutoModelForCausalLM.from_pretrained)", highlight=False, soft_wrap=True)
    OUT.print(f"what it kept, lost and won: {output / 'report.html'}", highlight=False, soft_wrap=True)


def _dry_run(options: Options, stages: Collection[str]) -> None:
    """Stages, tokens and data of a run that is not started, from all files of the teacher but its weights."""
    from flashmorph.cli.screen import RichScreen
    from flashmorph.convert.teacher import open_without_weights
    from flashmorph.data.corpus import unread_of
    from flashmorph.devices import pick_device, usable_memory
    from flashmorph.estimate.auto import Capacity, too_large, too_large_in_words
    from flashmorph.estimate.sizes import count_sizes
    from flashmorph.estimate.work import model_of
    from flashmorph.recipe.given import given_plan
    from flashmorph.recipe.notices import notices, of_default
    from flashmorph.recipe.outlook import check, outlook, training_contexts
    from flashmorph.recipe.preflight import preflight
    from flashmorph.run.folder import require_runs
    from flashmorph.run.marker import about_another_teacher

    quiet()
    require_runs(options.output, options.others or [])
    recipe = recipe_of(options)
    teacher = open_without_weights(options.teacher)
    config = teacher.config
    say = RichScreen(ERR if options.json else OUT).say
    another = about_another_teacher(options.output, options.teacher)
    for notice in filter(None, (replaced_mixture(options, recipe), of_default(recipe), teacher.note, another)):
        say(notice)
    recipe = fitted(recipe, config, say)
    check(teacher, recipe)
    plan = given_plan(teacher.name, config, recipe, options.plan, options.layers, teacher.revision)
    if tokenizer := teacher.tokenizer():
        for line in unread_of(recipe.data.corpus):
            say(line)
        preflight(recipe, tokenizer, config, stages)
    for notice in notices(recipe, config, tokenizer, stages):
        say(notice)
    rows = outlook(teacher.name, config, recipe, given=plan is not None)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    contexts = training_contexts(config, recipe)
    columns = ("stage", "tokens", "length", "mean context", "data")
    table = new_table(f"{options.teacher} -> {options.output}", *columns, left=("stage", "data"))
    for row in rows:
        tokens = "as it goes" if row["tokens"] is None else f"{row['tokens']:,}" if row["tokens"] else ""
        _, context = contexts.get(row["stage"], (None, ""))
        table.add_row(row["stage"], tokens, f"{row['length']:,}" if row["length"] else "", context, row["data"])
    OUT.print(table)
    device = pick_device(options.device)
    capacity = Capacity(usable_memory(device), bf16=recipe.bf16_on(device), kind=device.type)
    model = model_of(config, recipe)
    if large := too_large(recipe, model, count_sizes(model.host, config, model.config, device), capacity, stages):
        say(too_large_in_words(large, capacity))
