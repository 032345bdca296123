"""What the README and the decisions say of the strategies is what the referee's committed cells say."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from flashmorph.evaluation import paired_interval
from flashmorph.selection import DEFAULT_STRATEGY

ROOT = Path(__file__).parent.parent
REFEREE = ROOT / "benchmarks" / "results" / "referee"


@cache
def regrets(case: str) -> dict[tuple[str, str, int], float]:
    """By strategy, budget and seed, at full spend."""
    cells = json.loads((REFEREE / case / "compare.json").read_text(encoding="utf-8"))["cells"]
    return {
        (cell["strategy"], cell["budget"], cell["seed"]): cell["regret"]
        for cell in cells
        if cell["spend"] == 1 and cell["regret"] is not None
    }


def test_the_readme_says_what_the_referee_found():
    found = {row["strategy"]: row for row in json.loads((REFEREE / "summary.json").read_text(encoding="utf-8"))}
    told = re.findall(
        r"^\| `([a-z-]+)`[^|]*\| (\d\.\d{3}) \| (\d+) of (\d+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert {"uniform", "halo", "drop-one", "gates", "race", DEFAULT_STRATEGY} <= {name for name, *_ in told}
    for name, regret, first, cells in told:
        row = found[name]
        assert (regret, int(first), int(cells)) == (
            f"{row['regret']:.3f}",
            round(row["first"] * row["cells"]),
            row["cells"],
        )


def test_no_strategy_has_a_mean_regret_below_the_defaults_beyond_the_interval():
    rows = json.loads((REFEREE / "summary.json").read_text(encoding="utf-8"))
    assert len(rows) > 10
    for row in rows:
        if row["strategy"] not in (DEFAULT_STRATEGY, "exhaustive") and row["interval"]:
            assert row["interval"][1] > 0, row["strategy"]


@pytest.mark.parametrize("case", ["redundant", "twin_chains"])
@pytest.mark.parametrize("strategy", ["uniform", "drop-one", "halo"])
def test_where_layers_stand_in_for_each_other_the_default_chooses_better(case, strategy):
    """The enumerated optimum and the choice of rules that look at one layer are not the same there."""
    found = regrets(case)
    keys = [key for key in found if key[0] == DEFAULT_STRATEGY]
    assert len(keys) == 15
    # The uniform layout has no seed: its one cell a budget stands for all.
    other = [found.get((strategy, budget, seed), found.get((strategy, budget, 0))) for _, budget, seed in keys]
    low, _ = paired_interval([other], [[found[key] for key in keys]])
    assert low > 0
