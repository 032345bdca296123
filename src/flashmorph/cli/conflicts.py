"""Options that change nothing beside others or without them, and what `--data` replaces."""

from typing import TYPE_CHECKING, Any

import typer

from flashmorph.errors import UserError

if TYPE_CHECKING:
    from flashmorph.cli.options import Options


def require_use(options: "Options") -> None:
    """Refuse options that others make useless.

    Raises:
        UserError: names both.
    """
    from flashmorph.mixers.own import OWN_MIXERS
    from flashmorph.plan import Budget

    budget = options.budget if options.budget and not Budget.parse(options.budget).counts_heads else None
    if useless := "--strategy" if options.strategy else "--budget" if budget else "":
        for option, value in (("--plan", options.plan), ("--layers", options.layers)):
            if value:
                raise UserError(
                    f"{option} says what stays full, so that {useless} changes nothing: leave one of them out"
                )
    with_window = [name for name, mixer in OWN_MIXERS.items() if "window" in mixer.sizes]
    if options.window and options.mixers and not set(with_window) & set(options.mixers.split(",")):
        raise UserError(
            f"--window {options.window} is of no use to --mixers {options.mixers}: it is a size of "
            f"{', '.join(with_window)}"
        )


def require_with(ctx: typer.Context, needed: str, *options: str) -> None:
    """Refuse those of `options` that the command line has without the option that they belong to.

    Args:
        ctx: The command's, which knows what was given.
        needed: What is missing, such as `--curve`.
        options: Their names, such as `--within`.

    Raises:
        UserError: names both.
    """
    for option in options:
        source = ctx.get_parameter_source(option.removeprefix("--").replace("-", "_"))
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{option} changes nothing without {needed}: give {needed} too, or leave {option} out")


def replaced_mixture(options: "Options", recipe: Any) -> str:
    """What `--data` takes the place of, in words, where the recipe mixes several sources; else nothing."""
    from flashmorph.recipe.recipe import load_recipe

    own = options.recipe or options.kept_recipe
    before = load_recipe(own).data if options.data and own else None
    if not before or not before.mixture:
        return ""
    loss = "the loss is on all of its tokens (--set data.loss_on=replies takes replies and completions alone)"
    return f"--data stands in place of the recipe's mixture of {before.about}" + (
        f"; {loss}" if recipe.data.loss_on == "all" else ""
    )
