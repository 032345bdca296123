"""Do strategies choose the same layers when something beside the search changes? Two cases of the referee, compared.

    python benchmarks/referee.py --teachers natural --set seed=1 --suffix=-align1
    python benchmarks/plan_overlap.py natural natural-align1

The mean over seeds of the plans' intersection over their union. Other axes: `select.search.length=128` (the
context), `data.source=FOLDER` (the text).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "referee"


def main() -> None:
    """Read both cases' cells and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    arguments = parser.parse_args()
    one, other = plans_of(arguments.first), plans_of(arguments.second)
    groups: dict[tuple[str, str], list[float]] = {}
    for key in one.keys() & other.keys():
        strategy, budget, _ = key
        groups.setdefault((strategy, budget), []).append(len(one[key] & other[key]) / len(one[key] | other[key]))
    budgets = sorted({budget for _, budget in groups})
    table = Table(title=f"overlap of plans, {arguments.first} and {arguments.second}", title_justify="left")
    table.add_column("strategy")
    for budget in budgets:
        table.add_column(f"K = {budget}", justify="right")
    for strategy in sorted({strategy for strategy, _ in groups}):
        shares = [groups.get((strategy, budget)) for budget in budgets]
        table.add_row(strategy, *(f"{np.mean(share):.2f}" if share else "" for share in shares))
    Console().print(table)


def plans_of(case: str) -> dict[tuple[str, str, int], set[int]]:
    """The plan of every strategy, budget and seed at full spend."""
    cells = map(json.loads, (RESULTS / case / "cells.jsonl").read_text().splitlines())
    return {(cell["strategy"], cell["budget"], cell["seed"]): set(cell["full"]) for cell in cells if cell["spend"] == 1}


if __name__ == "__main__":
    main()
