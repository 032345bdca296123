"""The application that commands register with."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flashmorph.errors import UserError, quoted
from flashmorph.surface.quoting import shell_command
from flashmorph.versions import own_version

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")
_ONCE = ("--data", "--prompt")
"""Options of one value of which somebody may give several and mean all; of others the last one counts."""
_MAY_BE_EMPTY = ("--prompt", "--set")
"""Options whose own check has a message for an empty value."""


class _Commands(TyperGroup):
    """Commands that take no empty name: as a path it would be the folder that one happens to stand in."""

    def parse_args(self, ctx, args):
        """Refuse empty arguments, texts or prompts that are given twice, and settings without a `--set`; then see
        `click`.

        Raises:
            UserError: names what is empty, given twice, or without its option.
        """
        for before, argument in zip(["", *args], args, strict=False):
            option = argument.removesuffix("=") if argument.startswith("--") and argument.endswith("=") else None
            if argument and option is None or (option or before) in _MAY_BE_EMPTY:
                continue
            option = option or (before if before.startswith("-") else "an argument")
            raise UserError(f"{option} is empty; give it a value, or leave it out")
        name = next((word for word in args if not word.startswith("-")), "")
        if command := self.get_command(ctx, name):
            given = list(_given(command, args[args.index(name) + 1 :]))
            _require_once(given)
            _require_option(given)
        return super().parse_args(ctx, args)


def _given(command: Any, args: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """The options of a command line and their values, in order; None in place of an option for every other word."""
    known = {name: option for option in command.params for name in option.opts if name.startswith("-")}
    words = iter(args)
    for word in words:
        if word == "--":
            yield from ((None, word) for word in words)
        name, joined, value = word.partition("=")
        if name not in known and not word.startswith("--"):
            name, joined, value = word[:2], word[2:], word[2:]  # As in `-oFOLDER`.
        option = known.get(name)
        if option is None or option.is_flag:
            yield option, word
        else:
            yield option, value if joined else next(words, "")


def _require_once(given: Sequence[tuple[Any, str]]) -> None:
    """Refuse several values of one of `_ONCE`: the last one would silently count."""
    options = dict.fromkeys(option for option, _ in given if option and not option.multiple)
    for option in (option for option in options if option.opts[0] in _ONCE):
        values = [value for each, value in given if each is option]
        if len(values) > 1:
            name = option.opts[0]
            several = "; a recipe may mix several sources, in data.mixture" if name == "--data" else ""
            raise UserError(
                f"{name} takes one value, and it has {' and '.join(map(quoted, values))}: give one{several}"
            )


def _require_option(given: Sequence[tuple[Any, str]]) -> None:
    """Refuse a setting that follows another one without a `--set` of its own."""
    for (before, setting), (option, word) in pairwise(given):
        is_loose = option is None and _SETTING.match(word) and not Path(word).exists()
        if is_loose and before and "--set" in before.opts:
            raise UserError(
                f"{quoted(word)} has no --set: give each setting its own, "
                f"{shell_command(['--set', setting, '--set', word])}"
            )


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
