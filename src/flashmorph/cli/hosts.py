"""`flashmorph hosts`: which teachers have an exact host."""

import json
from collections.abc import Sequence
from typing import Any

from flashmorph.cli.app import app
from flashmorph.cli.options import OUT, JsonOption, quiet


@app.command()
def hosts(as_json: JsonOption = False) -> None:
    """Which teachers have an exact host, with which settings, and what serves the result.

    Settings go into a run with `--set host.NAME=VALUE`.

    Example: `flashmorph hosts`
    """
    from flashmorph.hosts.overview import overview

    quiet()
    table = overview()
    if as_json:
        print(json.dumps(table, indent=2))
        return
    for host in table["hosts"]:
        rows = [("teacher", family, about) for family, about in host["teachers"].items()]
        full, *others = host["options"].values()
        rows += [("switched layer", mixer, f"in the place of {full}") for mixer in others]
        for name, setting in host["settings"].items():
            shown = _shown(setting["default"])
            rows.append(("setting", f"host.{name}={shown}", setting["about"]))
        for engine in host["serves"]:
            needs = f"needs {engine['needs']}" if engine["needs"] else ""
            about = "; ".join(part for part in (engine["known"], engine["takes"], needs) if part)
            about += f". {engine['otherwise']}" if engine["otherwise"] else ""
            rows.append(("served by", f"{engine['name']} {engine['version']}", about))
        asked = next((f", with --{name}" for name in ("mixers", "window") if name in host["settings"]), "")
        _print_table(host["host"] + asked, rows)
    _print_table("no exact host", list(table["refused"].items()))


def _shown(default: Any) -> str:
    """A default in words. A window has none: 0 stands for none given."""
    if isinstance(default, bool):
        return str(default).lower()
    return {0: "TOKENS", None: "NUMBER", "": "NAMES"}.get(default, str(default))


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    OUT.print(table)
