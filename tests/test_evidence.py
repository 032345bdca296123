"""What the README and the decisions say of the strategies is what the referee's committed cells say."""

import importlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("name", ["teacher", "hybrid", "hybrid_undistilled", "uniform", "uniform_undistilled"])
def test_the_readmes_first_table_is_the_demos(name):
    row = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))[name]
    low, high = (100 * end for end in row["recall_interval"])
    figures = rf"\| \**{100 * row['recall']:.1f} %\** \| {low:.1f}-{high:.1f} \| \**{row['perplexity']:.2f}"
    assert re.search(figures, (ROOT / "README.md").read_text())


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


def test_over_teachers_the_default_is_better_than_layouts_and_ratios_and_no_more_can_be_told():
    """What decision 20 says of the intervals, whose cases are drawn anew, then seeds."""
    found = {row["strategy"]: row["interval"] for row in json.loads((REFEREE / "summary.json").read_text("utf-8"))}
    assert all(found[strategy][0] > 0 for strategy in ("uniform", "halo"))
    assert all(found[strategy][0] < 0 < found[strategy][1] for strategy in ("nll", "add-one", "gates"))
    assert found["drop-one"][0] == pytest.approx(0, abs=0.005)


def mean_interval(figures: list[float]) -> tuple[float, float]:
    return paired_interval([figures], [[0.0] * len(figures)])


def test_an_interval_is_the_same_however_many_resamples_are_drawn_at_once(monkeypatch):
    """All at once they are gigabytes where questions are many."""
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 40)).tolist()
    expected = paired_interval([one], [other])
    monkeypatch.setattr("flashmorph.evaluation.intervals._DRAWN_AT_ONCE", 120)
    assert paired_interval([one], [other]) == expected


def test_figures_of_one_cluster_are_no_independent_findings(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    clustered_interval = importlib.import_module("clustered").clustered_interval
    rng = np.random.default_rng(0)
    alike = [[[centre] * 5, [centre] * 5] for centre in rng.standard_normal(8)]
    flat = [figure for groups in alike for group in groups for figure in group]
    low, high = clustered_interval(alike)
    assert high - low > 2 * np.ptp(mean_interval(flat))
    assert high - low == pytest.approx(np.ptp(mean_interval([groups[0][0] for groups in alike])), rel=0.1)
    apart = [[rng.standard_normal(40).tolist()] for _ in range(40)]
    assert np.ptp(clustered_interval(apart)) < 1.6 * np.ptp(mean_interval(sum((groups[0] for groups in apart), [])))
    assert clustered_interval([[[1.0, 1.0], [3.0, 3.0]]]) == (2, 2)


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
