"""Cells of `compare` from version 0.1, converted once: the options of all groups in place of the full layers.

    python benchmarks/convert_cells.py benchmarks/results/referee

What is converted already stays as it is. `loss=1%` was a budget in 0.1 and is now the setting `tolerance` of the
strategy of that name; two settings of `race` that were off are gone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from flashmorph.files import atomic_path, write_json

OLD_BUDGET, NEW_BUDGET = "loss=1%", "found"
GONE = ("first_by_gradient", "hard_first")


def main() -> None:
    """Convert every case of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for case in sorted(path.parent for path in parser.parse_args().folder.glob("*/cells.jsonl")):
        print(f"{case}: {convert(case)} cells converted")


def convert(case: Path) -> int:
    """Convert one case; how many of its cells were old."""
    cells = [json.loads(line) for line in (case / "cells.jsonl").read_text(encoding="utf-8").splitlines()]
    layers = len(cells[0]["details"]["scores"])
    old = sum("full" in cell for cell in cells)
    with atomic_path(case / "cells.jsonl") as temporary:
        lines = [json.dumps(cell_of(cell, layers)) + "\n" for cell in cells]
        temporary.write_text("".join(lines), encoding="utf-8")
    if (case / "compare.json").is_file():
        write_json(case / "compare.json", summary_of(json.loads((case / "compare.json").read_text()), layers))
    return old


def cell_of(cell: dict[str, Any], layers: int) -> dict[str, Any]:
    """A cell with assignments, its keys in their order."""
    found = {}
    for name, value in cell.items():
        if name == "full":
            found["assignments"] = assignments(value, layers)
        elif name == "settings":
            found[name] = settings_of(value, cell)
        else:
            found[name] = NEW_BUDGET if (name, value) == ("budget", OLD_BUDGET) else value
    return found


def settings_of(settings: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are called now."""
    found = {name: value for name, value in settings.items() if name not in GONE or value}
    return {"tolerance": 0.01, **found} if cell["budget"] == OLD_BUDGET else found


def summary_of(summary: dict[str, Any], layers: int) -> dict[str, Any]:
    """compare.json with assignments."""

    def plan(value: Any) -> Any:
        return assignments(value, layers) if isinstance(value, list) else value

    found = {**summary}
    found["truths"] = {
        budget: {**truth, "best": plan(truth["best"]), "first": [plan(each) for each in truth["first"]]}
        for budget, truth in summary["truths"].items()
    }
    found["rows"] = [
        cell_of({**row, "plans": [plan(each) for each in row["plans"]]}, layers) for row in summary["rows"]
    ]
    for name in ("cells", "after_distillation", "tolerance"):
        found[name] = [cell_of(cell, layers) for cell in summary.get(name, [])]
    return found


def assignments(full: list[int], layers: int) -> dict[str, str]:
    """The options of all layers, from those that are full."""
    return {f"layers.{layer}": "full" if layer in full else "linear" for layer in range(layers)}


if __name__ == "__main__":
    main()
