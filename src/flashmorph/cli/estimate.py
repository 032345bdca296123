"""`flashmorph estimate`: what a run will take."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmorph.cli.app import app
from flashmorph.cli.costs import CostsOption, claim_costs, write_costs
from flashmorph.cli.options import (
    ERR,
    OUT,
    BaselineOption,
    BudgetOption,
    DataOption,
    ForceOption,
    JsonOption,
    MixersOption,
    Options,
    RecipeOption,
    SetOption,
    StrategyOption,
    WindowOption,
    fitted,
    numbers,
    quiet,
    recipe_of,
)
from flashmorph.cli.tables import new_table
from flashmorph.surface.terminal import bold


@app.command()
@app.command("plan", hidden=True)  # What it was called in 0.1.
def estimate(
    teacher: Annotated[
        str, typer.Argument(help="`tiny`, a folder with config.json, or a model on the hub.", metavar="TEACHER")
    ],
    recipe: RecipeOption = None,
    budget: BudgetOption = None,
    strategy: StrategyOption = None,
    baseline: BaselineOption = None,
    data: DataOption = None,
    window: WindowOption = None,
    mixers: MixersOption = None,
    changes: SetOption = None,
    gpu: Annotated[str | None, typer.Option(help="`h200`, `a100`, `l40s`, ...: gives hours and what fits.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share a batch.")] = 1,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the peak that hours assume; yours, if you know it.")
    ] = 0.3,
    contexts: Annotated[
        str | None, typer.Option(help="Context lengths of the cache, with commas. Default: 8192,32768,131072.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every figure with its formula.")] = False,
    costs: CostsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The cost of a run before it starts: parameters, cache, operations, memory, hours.

    Reads config.json alone: no weights, no tokenizer, no GPU. Parameters and cache are exact, memory and hours are
    estimates. Tokens are the recipe's, whatever the text of `--data`: `morph --dry-run` measures that.

    With `--costs` it writes what each layer (or head) takes of a token on the GPU, and nothing else:
    `--budget ms=4.2@32768 --set select.costs=FILE` spends it. `bench --costs` measures that instead.

    Example: `flashmorph estimate Qwen/Qwen3-8B --budget 25% --gpu h200 --gpus 8`

    Example: `flashmorph estimate Qwen/Qwen3-8B --gpu h200 --contexts 32768 --costs costs.json`
    """
    from flashmorph.cli.screen import RichScreen
    from flashmorph.convert.teacher import open_config
    from flashmorph.data.corpus import shares_of
    from flashmorph.estimate import CONTEXTS, estimated_costs, find_gpu
    from flashmorph.estimate import estimate as estimated
    from flashmorph.recipe.notices import of_default

    quiet()
    if costs:
        lengths = [claim_costs(costs, "estimate", force, "--contexts", contexts)]
    else:
        lengths = numbers("--contexts", contexts) if contexts else CONTEXTS
    chosen_gpu = find_gpu(gpu) if gpu else None
    options = Options(
        teacher=teacher,
        output=Path(),
        recipe=recipe,
        budget=budget,
        changes=changes,
        data=data,
        strategy=strategy,
        baseline=baseline,
        window=window,
        mixers=mixers,
    )
    settings = recipe_of(options)
    config = open_config(teacher)
    say = RichScreen(ERR if as_json else OUT).say
    if data:
        for part, _ in shares_of(settings.data.corpus):
            part.paths()  # Refuses what is not there.
        say(f"the cost is by the recipe's tokens, whatever the text: `morph --dry-run` measures {settings.data.about}")
    if notice := of_default(settings):
        say(notice)
    settings = fitted(settings, config, say)
    outcome = estimated(teacher, config, settings, chosen_gpu, gpus, utilisation, lengths)
    if costs:
        write_costs(costs, "estimate", estimated_costs(outcome, lengths[0]), {}, as_json)
        return
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
        return
    _show(outcome)
    if explain:
        from flashmorph.estimate.explain import explain as formulas

        for line in formulas(outcome):
            OUT.print(line, highlight=False, soft_wrap=True, markup=False)


def _show(outcome: Any) -> None:
    """Two tables and what they assume."""
    from flashmorph.estimate.explain import notes
    from flashmorph.units import amount, byte_size

    model = outcome.model
    OUT.print(
        f"{outcome.teacher} -> {model.host.name}: {model.kept} of {model.groups} {model.unit} stay full "
        f"(budget {outcome.budget})",
        highlight=False,
        soft_wrap=True,
    )
    table = new_table(None, "", "teacher", "hybrid", *(["least ms a token"] if outcome.gpu else []))
    both, vllm = (outcome.sizes.teacher, outcome.hybrid_parameters), outcome.in_vllm
    table.add_row("parameters", *map(amount, both))
    table.add_row("weights", *(byte_size(outcome.weight_bytes(parameters)) for parameters in both))
    for context, cache in outcome.cache.items():
        seconds = [outcome.seconds_per_token(*pair) for pair in zip(both, cache, strict=True)]
        times = [f"{1000 * least:.2f}" for least in seconds if least is not None]
        table.add_row(f"cache at {context:,}", *map(byte_size, cache), *([" -> ".join(times)] if times else []))
        if vllm:
            table.add_row("  in vLLM", *(byte_size(each.sequence_bytes(context)) for each in vllm))
    OUT.print(table)
    sharded = outcome.num_gpus > 1
    columns = ["stage", "tokens", "length", "FLOPs", *(["hours"] if outcome.gpu else []), "memory of a GPU"]
    table = new_table(None, *columns, *(["sharded"] if sharded else []))
    for stage in outcome.stages:
        hours = outcome.hours(stage)
        tokens = "as it goes" if stage.tokens is None else amount(stage.tokens) if stage.tokens else ""
        cells = [stage.name, tokens, f"{stage.length:,}" if stage.length else ""]
        cells.append(amount(stage.work.flops) if stage.work and stage.work.flops else "")
        if outcome.gpu:
            cells.append(_hours(hours))
        cells.append(_memory(outcome, stage, 1))
        table.add_row(*cells, *([_memory(outcome, stage, outcome.num_gpus)] if sharded else []))
    flops = sum(stage.work.flops for stage in outcome.stages if stage.work)
    total = [amount(flops), *([_hours(outcome.total_hours)] if outcome.gpu else []), ""]
    table.add_row(bold("all"), "", "", *total, *([""] if sharded else []))
    OUT.print(table)
    for line in notes(outcome):
        OUT.print(line, highlight=False, soft_wrap=True, markup=False)


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{hours:,.1f}" if hours >= 0.05 else "< 0.1"


def _memory(outcome: Any, stage: Any, gpus: int) -> str:
    from flashmorph.units import byte_size

    if not stage.memory:
        return ""
    if gpus > 1 and stage.memory.alone:
        return "CPU"
    needed = stage.memory.bytes(gpus)
    return byte_size(needed) + (" !" if outcome.gpu and needed > outcome.gpu.memory_bytes else "")
