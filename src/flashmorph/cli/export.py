"""The command that hands a hybrid to another engine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flashmorph.cli.app import app
from flashmorph.cli.options import ERR, OUT, quiet
from flashmorph.surface.terminal import harmless


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A finished run, or any folder with a hybrid.", metavar="RUN")],
    gguf: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")],
    llama_cpp: Annotated[
        Path, typer.Option("--llama-cpp", help="Your checkout of llama.cpp: its converter does the work.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            "--outtype",
            help="`f32`, `bf16`, `f16` or `q8_0`, as its converter's --outtype. Default: as it is.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
) -> None:
    """Write a hybrid as a GGUF file for llama.cpp and what is built on it, with the converter of your llama.cpp.

    Gives the converter the settings of the hybrid's class, then reads the file back: its list of full and linear layers
    must be the plan's. Its metadata describe the hybrid. Refuses hybrids that llama.cpp would run wrongly. Make smaller
    types (`Q4_K_M`, ...) from the file with llama.cpp's own `llama-quantize`.

    Example: `flashmorph export runs/demo --gguf demo.gguf --llama-cpp ~/llama.cpp`
    """
    from flashmorph.pipeline.export import export_gguf
    from flashmorph.plan import FULL
    from flashmorph.units import byte_size

    quiet()
    with ERR.status(Text(harmless(f"converting {run}"))):
        options = export_gguf(run, gguf, llama_cpp, dtype, force)
    full = ", ".join(str(layer) for layer, option in enumerate(options) if option == FULL)
    OUT.print(
        f"{gguf}: {byte_size(gguf.stat().st_size)}, layers {full} of {len(options)} full, as in {run}",
        highlight=False,
        soft_wrap=True,
    )
