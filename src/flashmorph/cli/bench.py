"""The command that times finished models, side by side."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from flashmorph.cli.app import app
from flashmorph.cli.costs import CostsOption, claim_costs, measure_for, write_costs
from flashmorph.cli.options import (
    ERR,
    OUT,
    DeviceOption,
    ForceOption,
    JsonOption,
    MixersOption,
    Options,
    RecipeOption,
    SetOption,
    UnusedOption,
    WindowOption,
    numbers,
    quiet,
)
from flashmorph.cli.tables import new_table
from flashmorph.errors import UserError
from flashmorph.files import short_names
from flashmorph.records import Figures
from flashmorph.surface.terminal import bold
from flashmorph.units import counted

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_MS = 1e3


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(help="Folders that flashmorph wrote, or teachers.", metavar="MODEL...")
    ],
    lengths: Annotated[
        str | None, typer.Option(help="Context lengths in tokens. Default: 512,1024,2048,4096.", metavar="N,N...")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=1_000_000, help="Timed rounds; models take turns in each.")] = 5,
    decode_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens written after each context.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="`auto` (float32 on a CPU, else the checkpoint's), `float32`, `bfloat16` or `float16`.")
    ] = "auto",
    costs: CostsOption = None,
    recipe: RecipeOption = None,
    window: WindowOption = None,
    mixers: MixersOption = None,
    changes: SetOption = None,
    allow_unused: UnusedOption = False,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time to read a context and to write a token after it, cache and memory, by context length, side by side.

    Medians with quartiles over rounds in which the models take turns, so that a slowing machine slows all of them;
    ratios to the first model; the power of the context length that time grows with; and the context from which on a
    model is faster than the first. The limit is what the bytes and operations of the model must take at the rates that
    this machine copies and multiplies at, measured before and after the rounds. Leave the machine alone meanwhile.

    With `--costs` it times one teacher in its host instead, with few and with many layers (or heads) switched, and
    writes what one of them takes: `--budget ms=4.2@32768 --set select.costs=FILE` spends it. `--recipe`, `--window`,
    `--mixers` and `--set host.NAME=...` are those of the run that will.

    Example: `flashmorph bench tiny runs/demo --lengths 128,256,512`

    Example: `flashmorph bench tiny --costs costs.json --lengths 504 --repeats 20`
    """
    import torch

    from flashmorph.bench import BenchSettings
    from flashmorph.bench import bench as measure
    from flashmorph.cli.screen import RichScreen
    from flashmorph.convert.load import load_model
    from flashmorph.convert.teacher import locate
    from flashmorph.devices import pick_device
    from flashmorph.pipeline.evaluate_models import check

    quiet()
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype!r} must be one of {', '.join(_DTYPES)}")
    names = list(dict.fromkeys(models))
    made = {"--recipe": recipe, "--window": window, "--mixers": mixers, "--set": changes, "--force": force}
    if costs:
        if len(names) > 1:
            raise UserError(f"--costs is about one teacher; got {len(names)} models")
        wanted_lengths = [claim_costs(costs, "bench", force, "--lengths", lengths)]
    elif alone := next((option for option, value in made.items() if value), None):
        raise UserError(f"{alone} is for --costs, which times one teacher in the host that a run would make")
    else:
        wanted_lengths = sorted(numbers("--lengths", lengths)) if lengths else list(BenchSettings().lengths)
    settings = BenchSettings(lengths=tuple(wanted_lengths), repeats=repeats, decode_tokens=decode_tokens)
    check(names, max(settings.lengths), decode_tokens)
    chosen = pick_device(device)
    wanted: Any = getattr(torch, dtype) if dtype != "auto" else torch.float32 if chosen.type == "cpu" else "auto"
    if costs:
        options = Options(
            teacher=names[0],
            output=costs,
            recipe=recipe,
            changes=changes,
            window=window,
            mixers=mixers,
            allow_unused=allow_unused,
        )
        write_costs(costs, "bench", *measure_for(options, settings, wanted, chosen), as_json)
        return
    screen = RichScreen(ERR)
    loaded = {name: load_model(locate(name)[0], wanted, chosen, screen.say, allow_unused) for name in names}
    for model in loaded.values():
        model.config.dtype = model.dtype  # The cache is held in what the model runs in.
    with screen.stage("bench", ", ".join(names)) as report:
        figures = measure(loaded, settings, report)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    show(figures)


def show(figures: Figures) -> None:
    """Print what `bench` found."""
    machine = figures["machine"]
    copies, multiplies = machine["bytes_per_second"] / 1e9, machine["operations_per_second"] / 1e9
    OUT.print(
        f"{machine['device']}, {machine['dtype']}, {counted(machine['threads'], 'thread')}\n"
        f"copies {copies:,.1f} GB/s, multiplies {multiplies:,.0f} GFLOP/s",
        highlight=False,
        soft_wrap=True,
    )
    labels = short_names(list(figures["models"]))
    OUT.print(_times(figures, labels, "prefill", "reading a context, ms"))
    OUT.print(_times(figures, labels, "decode", "writing a token after it, ms"))
    OUT.print(_sizes(figures, labels))
    for line in verdicts(figures, labels):
        OUT.print(line, highlight=False, markup=False, soft_wrap=True)


def _times(figures: Figures, labels: dict[str, str], kind: str, title: str) -> Table:
    first = next(iter(labels.values()))
    table = new_table(title, "tokens", "median", "quartiles", f"of {first}'s", "", "of the limit")
    for index, length in enumerate(figures["settings"]["lengths"]):
        table.add_row(bold(f"{length:,}"))
        for name, each in figures["models"].items():
            row = each[kind]["by_length"][index]
            low, high = (_MS * end for end in row["quartiles"])
            ratio, quartiles = "", ""
            if "of_first" in each[kind]:
                against = each[kind]["of_first"][index]
                ratio = f"x {against['median']:.2f}"
                quartiles = f"({against['quartiles'][0]:.2f}-{against['quartiles'][1]:.2f})"
            figure, limit = f"{_MS * row['median']:,.2f}", f"x {row['of_limit']:.1f}"
            table.add_row(f"  {labels[name]}", figure, f"({low:,.2f}-{high:,.2f})", ratio, quartiles, limit)
    return table


def _sizes(figures: Figures, labels: dict[str, str]) -> Table:
    first = next(iter(labels.values()))
    table = new_table("memory, MiB", "tokens", "cache", "by arithmetic", f"of {first}'s", "peak above the weights")
    for index, length in enumerate(figures["settings"]["lengths"]):
        table.add_row(bold(f"{length:,}"))
        for name, each in figures["models"].items():
            cache, peak = each["cache"][index], each["peak_memory"][index]["bytes"]
            ratio = f"x {cache['of_first']:.3f}" if "of_first" in cache else ""
            sizes = (f"{cache['bytes'] / 2**20:,.2f}", f"{cache['expected'] / 2**20:,.2f}")
            table.add_row(f"  {labels[name]}", *sizes, ratio, "" if peak is None else f"{peak / 2**20:,.1f}")
    return table


def verdicts(figures: Figures, labels: dict[str, str]) -> list[str]:
    """Growth of time, and the context from which a model is faster than the first."""
    first, *_ = labels.values()
    longest, lines = figures["settings"]["lengths"][-1], []
    for name, each in figures["models"].items():
        powers = [each[kind]["exponent"] for kind in ("prefill", "decode")]
        if None not in powers:
            lines.append(
                f"{labels[name]}: reading grows as tokens^{powers[0]:.2f}, writing as tokens^{powers[1]:.2f} "
                f"(the limit: {each['prefill']['exponent_of_limit']:.2f}, {each['decode']['exponent_of_limit']:.2f})"
            )
        for kind, doing in (("prefill", "reads"), ("decode", "writes")):
            if "wins_from" not in each[kind]:
                continue
            start = each[kind]["wins_from"]
            at_once = start == figures["settings"]["lengths"][0]
            where = (
                f"from {'at most ' if at_once else ''}{start:,.0f} tokens on" if start else "at none of these lengths"
            )
            lines.append(f"{labels[name]} {doing} faster than {first} {where} (up to {longest:,} measured)")
    return lines
