"""`flashmorph recipe`: a recipe as it was written, or every setting that it comes to."""

import json
import sys
from typing import Annotated

import typer

from flashmorph.cli.app import app


@app.command()
def recipe(
    name: Annotated[
        str, typer.Argument(help="`demo`, `laptop`, `default`, `chat` or a YAML file.", metavar="RECIPE")
    ] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print the values of all settings instead, as JSON.")] = False,
) -> None:
    """A recipe as it was written, with its comments: the start of one of your own.

    Groups of settings that your file leaves out (`tasks`, `data`, `align`, ...) are those of `default`. A group that it
    has is wholly its own: settings that are missing there have the values that `--json` prints.

    Example: `flashmorph recipe chat > my.yaml`, change it, then `flashmorph morph MODEL --recipe my.yaml --output RUN`
    """
    from flashmorph.recipe.source import recipe_text

    if not as_json:
        text, _ = recipe_text(name)
        sys.stdout.write(text)
        return
    from flashmorph.recipe.recipe import load_recipe

    print(json.dumps(load_recipe(name).model_dump(mode="json"), indent=2))
