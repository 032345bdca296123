"""The referee: the truth about every plan, cells that outlive an interruption, and what is said of them."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command
from test_selection import Surface, additive

from flashmorph.errors import UserError
from flashmorph.plan import Budget, Space
from flashmorph.referee.cells import Cell, CellFile
from flashmorph.referee.compare import Comparison
from flashmorph.referee.entry import FOUND, Entry, wanted
from flashmorph.referee.settings import CompareSettings
from flashmorph.referee.summary import summarise
from flashmorph.referee.truth import Truth, find_truths

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def truth_of(means, questions: int = 200, noise: float = 0.0) -> Truth:
    """Plans with one full layer each, whose losses share every question's difficulty."""
    rng = np.random.default_rng(0)
    space, budget = Space.of_layers(len(means)), Budget("layers", 1)
    plans = tuple(space.plan([group], budget) for group in space.groups)
    difficulty = rng.exponential(size=questions)
    own = noise * rng.standard_normal((len(means), questions))
    return Truth(plans, np.asarray(means)[:, None] + difficulty + own - own.mean(1, keepdims=True))


def test_regret_is_the_distance_to_the_best_plan():
    truth = truth_of([0.5, 0.2, 0.9])
    assert truth.best.full_layers == [1]
    assert [truth.regret(plan) for plan in truth.plans] == pytest.approx([0.3, 0, 0.7])
    with pytest.raises(ValueError, match="is no plan of budget 1"):
        truth.regret(Space.of_layers(3).plan(["layers.0", "layers.1"], Budget("layers", 2)))


def test_a_plan_that_cannot_be_told_from_the_best_ranks_first():
    truth = truth_of([0.5, 0.2, 0.21, 0.9], noise=0.2)
    assert [truth.rank(plan) for plan in truth.plans] == [3, 1, 1, 4]
    sharp = truth_of([0.5, 0.2, 0.21, 0.9], noise=0.001)
    assert [sharp.rank(plan) for plan in sharp.plans] == [3, 1, 2, 4]


def test_questions_are_paired():
    """Difficulties differ far more between questions than plans do; paired, the plans are told apart."""
    truth = truth_of([0.20, 0.22], noise=0.01)
    assert truth.losses.std() > 0.5
    assert [truth.rank(plan) for plan in truth.plans] == [1, 2]


def test_every_plan_of_every_budget_is_evaluated():
    space, budgets = Space.of_layers(8), [Budget("layers", kept) for kept in (1, 2)]
    truths = find_truths(lambda budget: space, budgets, Surface(additive, noise=0), max_plans=100)
    assert [plan.full_layers for plan in truths["2"].plans] == [list(pair) for pair in combinations(range(8), 2)]
    assert truths["1"].best.full_layers == [1] and truths["2"].best.full_layers == [1, 3]
    with pytest.raises(UserError, match="would evaluate 36 plans of 8 layers and max_plans is 35"):
        find_truths(lambda budget: space, budgets, Surface(additive), max_plans=35)


def plan(*full: int) -> dict[str, str]:
    return {f"layers.{layer}": "full" if layer in full else "linear" for layer in range(4)}


def cell(**changes) -> Cell:
    values = {"strategy": "gates", "budget": "2", "seed": 0, "spend": 1.0, "settings": {}, "assignments": plan(1, 3)}
    cost = {"tokens_forward": 10, "tokens_backward": 5, "flops": 2.0, "seconds": 1.0}
    return Cell(**{**values, "loss": 0.5, "regret": 0.1, "rank": 2, "cost": cost, "recall": 0.9, **changes})


def test_cells_outlive_an_interruption_and_those_of_another_context_are_dropped(tmp_path):
    file = CellFile(tmp_path / "cells.jsonl", "one")
    file.add(cell())
    file.add(cell(seed=1))
    file.add(cell(seed=1, assignments=plan(2, 3)))
    again = CellFile(tmp_path / "cells.jsonl", "one")
    assert [found.assignments for found in again.cells.values()] == [plan(1, 3), plan(2, 3)]
    other = CellFile(tmp_path / "cells.jsonl", "other")
    assert not other.cells
    other.add(cell(seed=2))
    assert [json.loads(line)["seed"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()] == [2]
    (tmp_path / "cells.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="line 1, is no cell of `compare`: remove that line"):
        CellFile(tmp_path / "cells.jsonl", "one")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("referee*/*/cells.jsonl")), ids=lambda path: path.parent.name)
def test_committed_cells_can_still_be_read(path):
    lines = path.read_text().splitlines()
    context = json.loads(lines[0])["context"]
    cells = CellFile(path, context).cells.values()
    assert len(cells) == sum(json.loads(line)["context"] == context for line in lines)
    assert all(each.half_width is None for each in cells if each.rank is not None)


def test_a_best_known_plan_gives_no_ranks_but_half_widths():
    cells = [cell(rank=None, regret=-0.1, half_width=0.2), cell(seed=1, rank=None, regret=0.2, half_width=0.4)]
    (row,) = summarise(Comparison(cells, {}))["rows"]
    assert (row["rank"], row["worst_rank"], row["first"]) == (None, None, None)
    assert row["regret"] == pytest.approx(0.05) and row["half_width"] == pytest.approx(0.3)


def test_the_summary_is_a_mean_over_seeds():
    cells = [
        cell(),
        cell(seed=1, assignments=plan(1, 2), regret=0.3, rank=1),
        cell(strategy="uniform", regret=None, rank=None),
    ]
    summary = summarise(Comparison(cells, {}))
    row, uniform = summary["rows"]
    assert (row["strategy"], row["seeds"], row["rank"], row["first"]) == ("gates", 2, 1.5, 0.5)
    assert row["regret"] == pytest.approx(0.2) and row["regret_spread"] == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert row["agreement"] == pytest.approx(1 / 3) and sorted(map(str, row["plans"])) == sorted(
        map(str, [plan(1, 2), plan(1, 3)])
    )
    assert uniform["regret"] is None and uniform["agreement"] is None
    json.dumps(summary)


def test_compare_judges_strategies_and_goes_on(teacher_folder, recipe_file, tmp_path, capsys, monkeypatch):
    arguments = ["compare", teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "run", "--budgets", "1"]
    arguments += ["--questions", 6, "--recall-questions", 1, "--seeds", 2]
    arguments += ["--distill-steps", 2]
    searched = ["--strategies", "uniform,greedy-forward,budgeted-gates+steps=3+random_budget=true,drop-one"]
    assert run_command(*arguments, *searched) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 plans, best" in printed and "greedy-forward" in printed
    made = (tmp_path / "run/compare/cells.jsonl").read_text()
    assert len(made.splitlines()) == 1 + 2 + 2 + 2
    summary = json.loads((tmp_path / "run/compare/compare.json").read_text())
    assert all(row["regret"] >= 0 and row["rank"] >= 1 for row in summary["rows"])
    assert {row["strategy"]: row["flops"] for row in summary["rows"]}["uniform"] == 0
    assert (tmp_path / "run/compare/regret.png").read_bytes()[:4] == b"\x89PNG"
    optimum, uniform = summary["after_distillation"]
    assert (optimum["strategy"], optimum["regret"], uniform["strategy"]) == ("optimum", 0, "uniform")
    assert optimum["loss"] != optimum["loss_before"]
    assert run_command(*arguments, *searched, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert summary.pop("made_by") == "flashmorph compare"
    assert again == summary and (tmp_path / "run/compare/cells.jsonl").read_text() == made
    assert run_command(*arguments, *searched, "--budgets", "01, 1", "--json") == 0  # One budget in two spellings.
    assert json.loads(capsys.readouterr().out) == summary
    assert run_command(*arguments, *searched, "--recall-questions", 3, "--json") == 0
    cells = [json.loads(line) for line in (tmp_path / "run/compare/cells.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in made.splitlines()]
    assert [cell.pop("recall_questions") for cell in cells] == [3] * 7
    assert [cell.pop("recall_questions") for cell in before] == [1] * 7
    assert {len(cell) for cell in cells} == {len(before[0])} and all(6 * cell["recall"] % 1 == 0 for cell in cells)
    assert [{**cell, "recall": 0} for cell in cells] == [{**cell, "recall": 0} for cell in before]
    capsys.readouterr()
    assert run_command(*arguments, *searched, "--distill-budget", "2") == 2
    assert "it is none of 1: give one of these to --distill-budget" in capsys.readouterr().err
    assert run_command(*arguments, "--strategies", "greedy") == 2
    assert "unknown strategy 'greedy'; did you mean 'greedy-" in capsys.readouterr().err
    assert run_command(*arguments, "--strategies", "gates+step=3") == 2
    assert "strategy gates has no setting 'step'" in capsys.readouterr().err
    assert run_command(*arguments, "--max-plans", 1) == 2
    assert "would evaluate 2 plans" in capsys.readouterr().err
    monkeypatch.setattr("flashmorph.run.recall.answers_right", lambda model, tokenizer, asked, _: [True] * len(asked))
    assert run_command(*arguments, "--strategies", "uniform", "--set", "evaluate.dtype=bfloat16", "--json") == 0
    assert {cell["recall"] for cell in json.loads(capsys.readouterr().out)["cells"]} == {1.0}


def test_a_share_of_the_cost_is_one_of_steps_or_questions():
    assert Entry.parse("budgeted-gates+steps=10").at(0.5, 64)["steps"] == 5
    assert Entry.parse("nll").at(0.25, 64)["num_questions"] == 16
    assert Entry.parse("race").at(1, 64)["num_questions"] == 64
    found = list(wanted(CompareSettings(strategies=("race", "uniform", "tolerance"), seeds=2, spends=(0.5, 1.0))))
    assert [(seed, spend) for entry, seed, spend, _ in found if entry.label == "uniform"] == [(0, 1.0)]
    assert found[0][0].label == "uniform"
    assert {budgets for entry, _, _, budgets in found if entry.label == "tolerance"} == {(FOUND,)}
