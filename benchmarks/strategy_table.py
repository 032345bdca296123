"""The table of docs/decisions/0020: every strategy on every case of the referee, from the committed cells.

    python benchmarks/strategy_table.py

Prints Markdown: mean regret in nats at each budget, over all cells the share of rank 1 and the worst rank, the paired
difference to the default with its 95 % interval (cases drawn anew, then seeds), and the thousand tokens of a
search for two layers; then what `race` takes of `greedy-forward`'s tokens. Runs no model.
"""

import json
from pathlib import Path

import numpy as np
from clustered import clustered_interval

from flashmorph.selection import DEFAULT_STRATEGY

REFEREE = Path(__file__).parent / "results" / "referee"
CASES = ("natural", "deep", "redundant", "twins", "chains", "many_chains", "twin_chains", "tiny")
STRATEGIES = (
    DEFAULT_STRATEGY,
    "greedy-forward",
    "race",
    "budgeted-gates+swaps=0+steps=150",
    "nll",
    "add-one",
    "greedy-backward",
    "drop-one",
    "gates",
    "halo",
    "uniform",
    "l0",
    "exhaustive",
)
BUDGETS, SEEDS = ("1", "2", "3"), range(5)
Cells = dict[tuple[str, str, str, int], dict]
"""By case, strategy, budget and seed, at full spend."""


def main() -> None:
    """Read and print."""
    cells = read()
    print(f"| strategy | {' | '.join(CASES)} | mean | rank 1 | worst | minus the default's | thousand tokens, K = 2 |")
    print("|---" * (len(CASES) + 6) + "|")
    for strategy in STRATEGIES:
        print(row(cells, strategy))
    for case in CASES:
        shares = [race_shares(cells, case, budget) for budget in BUDGETS]
        told = ", ".join(f"{np.mean(some):.0%} (at most {max(some):.0%})" for some in shares)
        print(f"race takes of greedy-forward's tokens on {case}, by budget: {told}")


def read() -> Cells:
    """All cells of all cases; a strategy without a seed stands for every seed."""
    cells: Cells = {}
    for case in CASES:
        for cell in json.loads((REFEREE / case / "compare.json").read_text())["cells"]:
            if cell["spend"] == 1 and cell["regret"] is not None:
                for seed in SEEDS if cell["strategy"] == "uniform" else (cell["seed"],):
                    cells[case, cell["strategy"], cell["budget"], seed] = cell
    return cells


def row(cells: Cells, strategy: str) -> str:
    """One line of the table."""
    found = {key: cell for key, cell in cells.items() if key[1] == strategy}
    by_case: dict[str, dict[str, list[float]]] = {}
    for key, cell in found.items():
        default = cells[key[0], DEFAULT_STRATEGY, *key[2:]]
        by_case.setdefault(key[0], {}).setdefault(key[2], []).append(cell["regret"] - default["regret"])
    difference = [each for budgets in by_case.values() for some in budgets.values() for each in some]
    low, high = clustered_interval([list(budgets.values()) for budgets in by_case.values()])
    tokens = [total(cell) for key, cell in found.items() if key[2] == "2"]
    ranks = [cell["rank"] for cell in found.values()]
    minus = "" if strategy == DEFAULT_STRATEGY else f"{np.mean(difference):+.3f} ({low:+.3f} to {high:+.3f})"
    figures = (
        f"{np.mean([cell['regret'] for cell in found.values()]):.3f}",
        f"{np.mean([rank == 1 for rank in ranks]):.0%}",
        str(max(ranks)),
        minus,
        f"{np.mean(tokens) / 1e3:.0f}",
    )
    return f"| `{strategy}` | {' | '.join([*(of_case(found, case) for case in CASES), *figures])} |"


def of_case(found: Cells, case: str) -> str:
    """Mean regret at each budget, and how many seeds stand behind it where not all do."""
    by_budget = [[cell["regret"] for key, cell in found.items() if key[0] == case and key[2] == k] for k in BUDGETS]
    if not any(by_budget):
        return "-"
    seeds = max(map(len, by_budget))
    means = " / ".join(f"{np.mean(regrets):.3f}" for regrets in by_budget if regrets).replace("0.000", "0")
    return means + (f" [{seeds}]" if seeds != len(SEEDS) else "")


def race_shares(cells: Cells, case: str, budget: str) -> list[float]:
    """Tokens of `race` by those of `greedy-forward`, seed by seed."""
    return [
        total(cells[case, "race", budget, seed]) / total(cells[case, "greedy-forward", budget, seed]) for seed in SEEDS
    ]


def total(cell: dict) -> float:
    """Tokens forward and backward."""
    return cell["cost"]["tokens_forward"] + cell["cost"]["tokens_backward"]


if __name__ == "__main__":
    main()
