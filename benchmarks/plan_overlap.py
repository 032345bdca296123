"""Do strategies choose the same layers when something beside the search changes? Cases of the referee, compared.

    python benchmarks/referee.py --teachers natural --set seed=1 --suffix=-align1
    python benchmarks/referee.py --teachers natural --set select.search.length=128 --suffix=-length128
    python benchmarks/referee.py --teachers natural --set data.source=FOLDER --suffix=-text
    python benchmarks/plan_overlap.py natural natural-align1 natural-length128 natural-text

FOLDER held the licences of Debian's /usr/share/common-licenses in pieces (`split -C 4000 --additional-suffix=.txt`).
The mean of the plans' intersection over their union: between seeds of the first case, and seed by seed between it and
each of the others. Writes `benchmarks/results/plan_overlap.json`.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flashmorph.files import write_json

RESULTS = Path(__file__).parent / "results"
Plans = dict[tuple[str, str], dict[int, set[str]]]
"""The plan of every strategy and budget, by seed."""


def main() -> None:
    """Compare, print a table, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("others", nargs="+")
    arguments = parser.parse_args()
    first, others = plans_of(arguments.first), {name: plans_of(name) for name in arguments.others}
    keys = sorted({key for plans in others.values() for key in plans} & first.keys())
    rows = [
        {
            "strategy": strategy,
            "budget": budget,
            "seeds": between_seeds(first[strategy, budget]),
            **{
                name: seed_by_seed(first[strategy, budget], plans.get((strategy, budget), {}))
                for name, plans in others.items()
            },
        }
        for strategy, budget in keys
    ]
    command = f"python benchmarks/plan_overlap.py {arguments.first} {' '.join(arguments.others)}"
    write_json(RESULTS / "plan_overlap.json", {"command": command, "rows": rows})
    table = Table(title=f"overlap of plans with those of {arguments.first}", title_justify="left")
    for column in ("strategy", "K", "seeds", *others):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        shares = ("" if row[column] is None else f"{row[column]:.2f}" for column in ("seeds", *others))
        table.add_row(row["strategy"], row["budget"], *shares)
    Console().print(table)


def plans_of(case: str) -> Plans:
    """What the searches of a case found at full spend."""
    plans: Plans = {}
    for line in (RESULTS / "referee" / case / "cells.jsonl").read_text().splitlines():
        cell = json.loads(line)
        if cell["spend"] == 1:
            plans.setdefault((cell["strategy"], cell["budget"]), {})[cell["seed"]] = {
                group for group, option in cell["assignments"].items() if option == "full"
            }
    return plans


def between_seeds(plans: dict[int, set[str]]) -> float | None:
    """The mean overlap of two seeds' plans."""
    return mean([overlap(one, other) for one, other in combinations(plans.values(), 2)])


def seed_by_seed(plans: dict[int, set[str]], others: dict[int, set[str]]) -> float | None:
    """The mean overlap of the plans that both cases have of a seed."""
    return mean([overlap(plans[seed], others[seed]) for seed in plans.keys() & others.keys()])


def overlap(one: set[str], other: set[str]) -> float:
    """Intersection over union."""
    return len(one & other) / len(one | other)


def mean(shares: list[float]) -> float | None:
    """None where there is nothing to average."""
    return float(np.mean(shares)) if shares else None


if __name__ == "__main__":
    main()
