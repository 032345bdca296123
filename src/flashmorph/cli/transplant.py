"""`flashmorph transplant`: the exact move alone."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flashmorph.cli.app import app
from flashmorph.cli.options import (
    ERR,
    OUT,
    DeviceOption,
    TeacherArgument,
    UnusedOption,
    quiet,
)
from flashmorph.errors import UserError
from flashmorph.surface.terminal import harmless


@app.command()
def transplant(
    teacher: TeacherArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint; new or empty.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the host: `host.mamba_expand=1`.")
    ] = None,
    allow_unused: UnusedOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Move a teacher into its host, all layers full, with the same logits; nothing else.

    Works without a tokenizer. OUTPUT must be new or empty. `--set host.NAME=VALUE` changes a setting of the host.

    Example: `flashmorph transplant Qwen/Qwen3-0.6B --output qwen3-as-host`
    """
    from flashmorph.convert.save import write_host
    from flashmorph.convert.teacher import open_teacher
    from flashmorph.devices import pick_device
    from flashmorph.hosts import configure
    from flashmorph.progress import silent
    from flashmorph.recipe.recipe import parse_changes
    from flashmorph.surface.outputs import claim_folder

    quiet()
    claim_folder(output)
    source = open_teacher(teacher)
    source.tokenizer()
    given = parse_changes(changes or [])
    if other := [key for key in given if not key.startswith("host.")]:
        raise UserError(f"--set {other[0]}: transplant has settings of the host only, --set host.NAME=VALUE")
    settings = {key.removeprefix("host."): value for key, value in given.items()}
    host, config = configure(source.config, settings)
    with ERR.status(Text(harmless(f"moving {teacher}"))):
        record = write_host(source, output, settings, pick_device(device), silent, allow_unused)
    for notice in filter(None, (source.note, *record["notices"])):
        ERR.print(notice, highlight=False, soft_wrap=True)
    OUT.print(
        f"{output}: {host.name}, all {config.num_hidden_layers} layers full; {record['summary']}",
        highlight=False,
        soft_wrap=True,
    )
