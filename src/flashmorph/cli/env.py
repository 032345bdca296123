"""`flashmorph env`: versions, devices and kernels."""

import json

from flashmorph.cli.app import app
from flashmorph.cli.options import OUT, JsonOption, quiet


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Versions, devices, and which kernels will be used and why. Add its output to a bug report.

    Example: `flashmorph env`
    """
    from flashmorph.cli.environment import describe

    quiet()
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        OUT.print(f"{name:<{width}}  {value}", highlight=False, soft_wrap=True)
