"""The commands. Each calls the same functions as the library; see `pipeline.py` for the path itself.

What is slow to import is imported inside the commands: `--help` answers at once.
"""

import os
import sys

from flashmorph.cli import path  # noqa: F401

# isort: split
# `--help` lists commands in the order in which they are registered.
from flashmorph.cli import bench, choose, costs, evaluate, export, look, referee  # noqa: F401
from flashmorph.cli.app import app
from flashmorph.cli.options import ERR
from flashmorph.errors import OutOfMemory, UserError

_SHARED = ("morph", "align", "select", "build", "distill", "extend")
"""Commands that several processes run together."""


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2. Of several processes the first speaks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # Else it warns of every process that is started.
    processes, is_first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    if not is_first:
        sys.stdout = open(os.devnull, "w")
    try:
        if processes > 1 and sys.argv[1:] and sys.argv[1] not in _SHARED and "--help" not in sys.argv:
            raise UserError(f"{processes} processes can share {', '.join(_SHARED)}; run this without torchrun")
        app()
    except UserError as error:
        if is_first or isinstance(error, OutOfMemory):
            ERR.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first:
            ERR.print("interrupted; the same command again goes on from here")
        sys.exit(130)


def _plain(text: str) -> str:
    return " ".join(text.replace("[", r"\[").split())


__all__ = ["app", "main"]
