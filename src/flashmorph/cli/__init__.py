"""The commands. Each calls the same functions as the library; see `pipeline.py` for the path itself.

What is slow to import is imported inside the commands: `--help` answers at once.
"""

import os
import sys

from flashmorph.cli import path  # noqa: F401

# isort: split
# `--help` lists commands in the order in which they are registered.
from flashmorph.cli import bench, choose, costs, evaluate, look, referee  # noqa: F401
from flashmorph.cli.app import app
from flashmorph.cli.options import ERR
from flashmorph.errors import UserError


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # Else it warns of every process that is started.
    try:
        app()
    except UserError as error:
        ERR.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        ERR.print("interrupted; the same command again goes on from here")
        sys.exit(130)


def _plain(text: str) -> str:
    return " ".join(text.replace("[", r"\[").split())


__all__ = ["app", "main"]
