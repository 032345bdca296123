"""The published gates over the weight of their penalty: how many stay open, and how good the K largest are.

    python benchmarks/referee.py --teachers natural --strategies gates gates+penalty=0.01 gates+penalty=1
    python benchmarks/gates_lambda.py natural

Reads the cells of the first command; prints a table and writes `benchmarks/results/referee/<teacher>/gates_lambda.png`.
The distance of hidden states is a mean over the width (docs/decisions/0005).
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from flashmorph.referee.entry import Entry

RESULTS = Path(__file__).parent / "results" / "referee"
OPEN, PUBLISHED = 0.01, 0.1


def main() -> None:
    """Read, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    arguments = parser.parse_args()
    folder = RESULTS / arguments.teacher
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    cells = [cell for cell in cells if cell["strategy"].split("+")[0] == "gates" and cell["spend"] == 1]
    found: dict[float, list[dict]] = {}
    for cell in cells:
        own = Entry.parse(cell["strategy"]).settings
        if set(own) <= {"penalty"}:
            found.setdefault(own.get("penalty", PUBLISHED), []).append(cell)
    budgets = sorted({cell["budget"] for cell in cells})
    table = Table(title=f"published gates on {arguments.teacher}, mean over seeds", title_justify="left")
    for column in ("penalty", "gates open", *(f"rank, K = {budget}" for budget in budgets)):
        table.add_column(column, justify="right")
    rows = []
    for penalty, some in sorted(found.items()):
        opened = np.mean([sum(score > OPEN for score in cell["details"]["scores"]) for cell in some])
        ranks = [np.mean([cell["rank"] for cell in some if cell["budget"] == budget]) for budget in budgets]
        rows.append((penalty, opened, ranks))
        table.add_row(f"{penalty:g}", f"{opened:.1f}", *(f"{rank:.1f}" for rank in ranks))
    Console().print(table)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    left.plot([row[0] for row in rows], [row[1] for row in rows], "o-")
    left.set(xscale="log", xlabel="penalty (lambda)", ylabel=f"gates above {OPEN}", title=arguments.teacher)
    for place, budget in enumerate(budgets):
        right.plot([row[0] for row in rows], [row[2][place] for row in rows], "o-", label=f"K = {budget}")
    right.set(xscale="log", yscale="log", xlabel="penalty (lambda)", ylabel="rank of the K largest")
    right.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "gates_lambda.png", dpi=150)


if __name__ == "__main__":
    main()
