"""`flashmorph report`: one page about a finished run."""

from pathlib import Path
from typing import Annotated

import typer

from flashmorph.cli.app import app
from flashmorph.cli.options import OUT, ForceOption


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
