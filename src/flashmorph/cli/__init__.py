"""The commands. Each calls the same functions as the library; see `pipeline/morph.py` for the path itself.

What is slow to import is imported inside the commands: `--help` answers at once.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from rich.text import Text

# `--help` lists commands in the order in which they are registered.
# isort: off
from flashmorph.cli import morph, transplant, align, select, build  # noqa: F401
from flashmorph.cli import evaluate, report, generate, bench, export  # noqa: F401
from flashmorph.cli import estimate, compare, recipe, hosts, env  # noqa: F401

# isort: on
from flashmorph.cli.app import app
from flashmorph.cli.options import ERR
from flashmorph.cli.ranks import are_several, as_one_of_several, give_way, rank
from flashmorph.errors import OnEveryRank, UserError, first_line, is_out_of_memory
from flashmorph.surface.interrupts import Interrupted, listening, sentence
from flashmorph.surface.terminal import harmless, stand_in_for_what_cannot_be_shown

_SHARED = ("morph", "align", "select", "build", "distill", "extend")
"""Commands that several ranks may run together."""
_LONGEST_WORD = 160
_CTRL_C = 130


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2.

    Rank 0 prints what all ranks have in common, another one what it alone has.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # Else it warns of every process that is started.
    if rank():
        sys.stdout = open(os.devnull, "w")
    stand_in_for_what_cannot_be_shown()
    with listening(), as_one_of_several():
        try:
            _refuse_undecodable(sys.argv[1:])
            with _as_sentences():
                _run()
        except UserError as error:
            if rank():
                give_way()
            if not rank() or not isinstance(error, OnEveryRank):
                who = f"rank {rank()}: " if rank() else ""
                ERR.print(Text.assemble(("error:", "bold red"), " ", who, _one_line(str(error))), soft_wrap=True)
            sys.exit(2)
        except Interrupted:
            raise
        except SystemExit as stop:
            # typer's word for a KeyboardInterrupt that a library raised.
            if stop.code == _CTRL_C and not rank():
                ERR.print(sentence())
            raise


def _run() -> None:
    if are_several() and sys.argv[1:] and sys.argv[1] not in _SHARED and "--help" not in sys.argv:
        count = os.environ["WORLD_SIZE"]
        raise UserError(f"{count} processes can share {', '.join(_SHARED)}; run this without torchrun")
    app()


@contextmanager
def _as_sentences() -> Iterator[None]:
    """Errors of the file system about a path (a name too long, a folder without permission), a device's lack of memory
    outside of stages, and panics of libraries.

    Those that read tokenizers and weights are written in Rust, whose panics are no `Exception`.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | os.PathLike):
            raise
        raise UserError(f"{error.filename} cannot be used: {error.strerror}") from error
    except BaseException as error:
        if is_out_of_memory(error):
            raise UserError(
                f"{first_line(cast(Exception, error))}: ask for shorter contexts, for fewer tokens at once (such as "
                "--set evaluate.batch_tokens=4096), or for --device cpu"
            ) from error
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"a tokenizer or its text is more than its library can do, which says: {error}") from error


def _refuse_undecodable(arguments: list[str]) -> None:
    """The libraries that read weights and tokenizers take names in UTF-8 only."""
    for argument in arguments:
        if any("\ud800" <= char <= "\udfff" for char in argument):
            raise UserError(f"{argument} is no text in the encoding of this system, {sys.getfilesystemencoding()}")


def _one_line(text: str) -> str:
    """A sentence, the endless words in it cut in their middle."""
    half = _LONGEST_WORD // 2
    return " ".join(
        f"{word[:half]}…{word[-half:]}" if len(word) > _LONGEST_WORD else word for word in harmless(text).split()
    )


__all__ = ["app", "main"]
