"""The application that commands register with."""

from typing import Annotated

import typer
from typer.core import TyperGroup

from flashmorph.errors import UserError
from flashmorph.versions import own_version

_MAY_BE_EMPTY = ("--prompt", "--set")
"""Options whose own check has a message for an empty value."""


class _Commands(TyperGroup):
    """Commands that take no empty name: as a path it would be the folder that one happens to stand in."""

    def parse_args(self, ctx, args):
        """Refuse empty arguments, then see `click`.

        Raises:
            UserError: names what is empty.
        """
        for before, argument in zip(["", *args], args, strict=False):
            option = argument.removesuffix("=") if argument.startswith("--") and argument.endswith("=") else None
            if argument and option is None or (option or before) in _MAY_BE_EMPTY:
                continue
            option = option or (before if before.startswith("-") else "an argument")
            raise UserError(f"{option} is empty; give it a value, or leave it out")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a trained Transformer cheap on long contexts: keep full attention in the few layers that need it.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flashmorph {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
