"""Malformed recipes, plans, texts and run folders: one sentence or what is right, and nothing harmed."""

from hostile import plans, recipes, runs, texts
from hostile.harness import failures
from hostile.seeds import number, seed


def test_recipes(tmp_path):
    assert not failures(recipes.generate(seed(), number(150)), tmp_path)


def test_plans(tmp_path):
    assert not failures(plans.generate(seed(), number(60)), tmp_path)


def test_texts(tmp_path):
    assert not failures(texts.generate(seed(), number(40)), tmp_path)


def test_run_folders(tmp_path):
    assert not failures(runs.generate(seed(), number(96)), tmp_path)
