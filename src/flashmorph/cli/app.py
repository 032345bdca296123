"""The application that commands register with."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a trained Transformer cheap on long contexts: keep full attention in the few layers that need it.",
)
