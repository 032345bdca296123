"""Can the teacher do it? Tasks that it cannot are named before they cost anything, and no search goes by them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FEW_STEPS, random_qwen3, run_command, tiny_tokenizer

import flashmorph.assets as assets
from flashmorph.convert.load import load_model
from flashmorph.pipeline.branches import warning, worse_than_silent
from flashmorph.pipeline.signal import ask_teacher, measure_signal
from flashmorph.plan import Space
from flashmorph.recipe.outlook import LEAST_QUESTIONS, goes_by_answers
from flashmorph.recipe.recipe import load_recipe
from flashmorph.selection import STRATEGIES
from flashmorph.selection.search import asks_questions
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings, make_example

TINY = Path(assets.__path__[0]) / "tiny"


def questions_of(task: dict[str, Any], number: int = 6, length: int = 128, style: str = "lines"):
    layout = Layout(tiny_tokenizer(), STYLES[style], Haystack.repeated())
    settings = TaskSettings.model_validate(task)
    return [make_example(settings, layout, STYLES[style], "validation", length, 0, place) for place in range(number)]


def test_a_teacher_that_answers_is_told_from_one_that_does_not():
    tokenizer = tiny_tokenizer()
    keys = questions_of({"task": "many_keys", "num_keys": 2})
    able = ask_teacher(load_model(TINY, torch.float32), tokenizer, {"keys": keys})["keys"]
    assert able["recall"] > 0.8 and able["loss"] < 0.2 * able["guessing"] and not able["at_chance"]
    random = ask_teacher(random_qwen3(vocab_size=len(tokenizer)), tokenizer, {"keys": keys})["keys"]
    assert random["recall"] == 0 and random["loss"] > random["guessing"] and random["at_chance"]


def test_guessing_costs_what_its_digits_are_worth():
    (example,) = questions_of({"task": "many_keys", "num_keys": 1}, number=1)
    figures = ask_teacher(random_qwen3(vocab_size=len(tiny_tokenizer())), tiny_tokenizer(), {"one": [example]})["one"]
    tokens = len(example.input_ids) - example.prompt_tokens
    assert figures["guessing"] * tokens == pytest.approx(np.log(900_000))


class Told:
    """An objective that is told its losses: `[plans, questions]`, all full and then none."""

    def __init__(self, losses: np.ndarray):
        self.losses = losses

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        assert [len(plan.full_groups) for plan in plans] == [4, 0]
        return self.losses


def test_each_task_is_measured_on_its_own_questions():
    rng = np.random.default_rng(0)
    full = rng.exponential(size=60)
    added = np.zeros(60)
    added[0::3], added[1::3] = 0.5 + 0.1 * rng.standard_normal(20), 0.3 * rng.standard_normal(20)
    added[2::3] = -0.5
    found = measure_signal(["able", "noise", "worse"], Space.of_layers(4), Told(np.stack([full, full + added])))
    lows, highs = zip(*(figures["interval"] for figures in found.values()), strict=True)
    assert 0 < lows[0] < 0.5 < highs[0] + 0.1 and lows[1] < 0 < highs[1] and highs[2] < 0
    for place, figures in enumerate(found.values()):
        assert figures["empty"] - figures["full"] == pytest.approx(added[place::3].mean())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_signal_is_asked_for_where_the_choice_goes_by_answers(strategy):
    recipe = load_recipe("default", {"select.strategy": strategy})
    assert recipe.select.require_signal and goes_by_answers(recipe) == asks_questions(strategy, {})
    assert goes_by_answers(recipe) == STRATEGIES[strategy].asks_questions
    assert not goes_by_answers(load_recipe("default", {"select.strategy": strategy, "select.require_signal": False}))
    assert not asks_questions("gates", {"data": "text"})


@pytest.mark.parametrize("strategy", ["first", "last", "middle", "uniform", "kl", "tolerance"])
def test_a_choice_without_answers_needs_no_signal(strategy):
    assert not goes_by_answers(load_recipe("default", {"select.strategy": strategy}))


def test_a_layer_is_worse_than_silent_from_an_error_of_1_on():
    assert worse_than_silent([0.3, 1.0, 0.99, float("nan")], layers=4) == [1, 3]
    assert worse_than_silent([0.3, 0.2, 1.5, 0.2, 0.1, 0.1], layers=3) == [1]
    assert worse_than_silent([], layers=2) == []
    assert "layer 0 is worse" in warning([0]) and warning([0]).endswith("switches it")
    assert "layers 1, 3 are worse" in warning([1, 3]) and warning([1, 3]).endswith("switches them")


def recipe_of(path: Path, tasks: dict[str, dict[str, Any]], length: int = 96) -> Path:
    select = {**FEW_STEPS["select"], "settings": {"steps": 2, "swaps": 0}, "require_signal": True}
    select |= {"teacher_questions": 2, "search": {**FEW_STEPS["select"]["search"], "length": length}}
    path.write_text(yaml.safe_dump({**FEW_STEPS, "baseline": None, "tasks": tasks, "select": select}))
    return path


KEYS = {"one_key": {"task": "many_keys", "num_keys": 1}}
VALUES = {"two_values": {"task": "many_values", "num_values": 2, "num_keys": 1}}


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in run.glob(f"stages/{stage}-*/stage.json")]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, teacher_folder) -> Path:
    """A run of a teacher that knows nothing: it was asked, and aligned."""
    run, folder = tmp_path_factory.mktemp("runs") / "random", tmp_path_factory.mktemp("recipes")
    recipe = recipe_of(folder / "recipe.yaml", FEW_STEPS["tasks"])
    assert run_command("align", teacher_folder, "--recipe", recipe, "--output", run) == 0
    return run


def test_a_teacher_at_chance_is_named_before_it_is_aligned(aligned, teacher_folder, tmp_path, capsys):
    (record,) = records(aligned, "teacher")
    assert record["at_chance"] == list(FEW_STEPS["tasks"]) and record["summary"].count("(at chance)") == 2
    recipe = recipe_of(tmp_path / "recipe.yaml", FEW_STEPS["tasks"])
    assert run_command("align", teacher_folder, "--recipe", recipe, "--output", aligned) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.endswith("done before")]
    assert names.index("teacher") < names.index("align")


def test_a_search_without_a_task_to_go_by_stops_in_words(aligned, teacher_folder, tmp_path, capsys):
    recipe = recipe_of(tmp_path / "recipe.yaml", FEW_STEPS["tasks"])
    plan = tmp_path / "plan.json"
    select = ("select", teacher_folder, "--from", aligned, "--recipe", recipe, "--output", plan)
    for _ in range(2):
        assert run_command(*select) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "there is nothing to choose layers by" in told and "--set select.require_signal=false" in told
        assert all(name in told for name in FEW_STEPS["tasks"])
    assert not plan.exists() and not records(aligned, "select") and len(records(aligned, "signal")) == 1
    assert run_command(*select, "--curve") == 2
    assert not records(aligned, "curve") and len(records(aligned, "signal")) == 1
    capsys.readouterr()
    assert run_command(*select, "--set", "select.require_signal=false") == 0
    assert run_command(*select[:-1], tmp_path / "uniform.json", "--strategy", "uniform") == 0
    (record,) = records(aligned, "signal")
    assert record["settings"]["questions"] == LEAST_QUESTIONS * len(FEW_STEPS["tasks"])


def test_a_plan_that_is_given_is_not_asked_about(teacher_folder, tmp_path):
    recipe = recipe_of(tmp_path / "recipe.yaml", FEW_STEPS["tasks"])
    command = ("build", teacher_folder, "--recipe", recipe, "--output", tmp_path / "run", "--layers", "1")
    assert run_command(*command) == 0
    assert not records(tmp_path / "run", "teacher") and not records(tmp_path / "run", "signal")


def test_what_is_left_out_is_another_search(tmp_path, capsys, monkeypatch):
    """The embedded teacher answers for one key; the other task is made to look as if it did not."""
    run = tmp_path / "run"
    every, one = recipe_of(tmp_path / "two.yaml", {**KEYS, **VALUES}), recipe_of(tmp_path / "one.yaml", KEYS)

    def measured(tasks, space, objective, report):
        found = measure_signal(tasks, space, objective)
        return {name: {**each, **({"interval": [-0.1, 0.1]} if name in VALUES else {})} for name, each in found.items()}

    monkeypatch.setattr("flashmorph.pipeline.signal.measure_signal", measured)
    assert run_command("align", "tiny", "--recipe", one, "--output", run) == 0
    capsys.readouterr()
    select = ("select", "tiny", "--from", run, "--output", tmp_path / "plan.json", "--recipe")
    assert run_command(*select, one) == 0
    assert "left out" not in capsys.readouterr().out
    assert run_command(*select, every) == 0
    assert "left out of the search, as full attention makes no difference there: two_values" in capsys.readouterr().out
    alone, without = sorted(records(run, "select"), key=lambda record: len(record["left_out"]))
    assert (alone["left_out"], without["left_out"]) == ([], ["two_values"])
    assert alone["digest"] != without["digest"] and without["settings"]["left_out"] == ["two_values"]
    assert alone["settings"]["tasks"] == without["settings"]["tasks"]
    assert alone["summary"] == without["summary"]
    signals = [record["tasks"] for record in records(run, "signal")]
    assert len(signals) == 2 and all(figures["one_key"]["interval"][0] > 0 for figures in signals)
