"""The commands that look at finished runs and models, and at the machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flashmorph.cli.app import app
from flashmorph.cli.options import ERR, OUT, DeviceOption, ForceOption, JsonOption, UnusedOption, quiet


@app.command()
def generate(
    models: Annotated[list[str], typer.Argument(help="Folders or teachers.", metavar="MODEL...")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    allow_unused: UnusedOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt with several models, side by side (greedy, with the cache).

    Example: `flashmorph generate tiny runs/demo --prompt "@ file class:482139"`
    """
    from flashmorph.devices import pick_device
    from flashmorph.judge import continue_prompt
    from flashmorph.screen import RichScreen

    quiet()
    tell = RichScreen(ERR).say
    for model in models:
        text = continue_prompt(model, prompt, max_new_tokens, pick_device(device), tell, allow_unused)
        OUT.rule(model, align="left")
        OUT.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def hosts(as_json: JsonOption = False) -> None:
    """Which teachers have an exact host, with which settings, and what serves the result.

    Settings go into a run with `--set host.NAME=VALUE`.

    Example: `flashmorph hosts`
    """
    from flashmorph.hosts.overview import overview

    quiet()
    found = overview()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for host in found["hosts"]:
        rows = [("teacher", family, about) for family, about in host["teachers"].items()]
        full, *others = host["options"].values()
        rows += [("switched layer", mixer, f"in the place of {full}") for mixer in others]
        for name, setting in host["settings"].items():
            rows.append(("setting", f"host.{name}={setting['default']}", setting["about"]))
        for engine in host["serves"]:
            needs = f"needs {engine['needs']}" if engine["needs"] else ""
            about = "; ".join(part for part in (engine["known"], engine["takes"], needs) if part)
            about += f". {engine['otherwise']}" if engine["otherwise"] else ""
            rows.append(("served by", f"{engine['name']} {engine['version']}", about))
        _print_table(host["host"] + (", with --window" if "window" in host["settings"] else ""), rows)
    _print_table("no exact host", list(found["refused"].items()))


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    OUT.print(table)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; PNG figures go into `figures` beside it.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """One page of what a run kept, lost and won: report.html in the run, one file that needs no network.

    `morph` writes it at its end. It shows what the run's folder holds: after `flashmorph evaluate ... --report RUN`
    also recall by length and depth and the loss by class of token; after `flashmorph compare --output RUN` also the
    choice against all plans.

    Example: `flashmorph report runs/demo`
    """
    from flashmorph.report import write_report

    written = write_report(run, output, force)
    OUT.print(f"written: {written} and {written.parent / 'figures'}", highlight=False, soft_wrap=True)


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Versions, devices, and which kernels will be used and why. Add its output to a bug report.

    Example: `flashmorph env`
    """
    from flashmorph.environment import describe

    quiet()
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        OUT.print(f"{name:<24} {value}", highlight=False, soft_wrap=True)
