"""`flashmorph generate`: continuations of a prompt by several models, side by side."""

from typing import Annotated

import typer

from flashmorph.cli.app import app
from flashmorph.cli.options import ERR, OUT, DeviceOption, UnusedOption, quiet


@app.command()
def generate(
    models: Annotated[list[str], typer.Argument(help="Folders or teachers.", metavar="MODEL...")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    allow_unused: UnusedOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt with several models, side by side (greedy, with the cache).

    Example: `flashmorph generate tiny runs/demo --prompt $'@ file class:482139\\n? file class:'`
    """
    from flashmorph.cli.screen import RichScreen
    from flashmorph.devices import pick_device
    from flashmorph.pipeline.prompt import continue_prompt

    quiet()
    say = RichScreen(ERR).say
    for model in models:
        text = continue_prompt(model, prompt, max_new_tokens, pick_device(device), say, allow_unused)
        OUT.rule(model, align="left")
        OUT.print(text, highlight=False, markup=False, soft_wrap=True)
