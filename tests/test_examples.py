"""The examples run as they are shown, only shorter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashmorph
from flashmorph.plan import Plan

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_morphing_in_python_leaves_a_stock_checkpoint(tmp_path):
    command = [sys.executable, EXAMPLES / "morph_in_python.py", tmp_path, "--budget", "3", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert model.config.layer_types.count("full_attention") == 3
    assert model.config.layer_types.count("linear_attention") == 5
    prompt = AutoTokenizer.from_pretrained(tmp_path / "hybrid")("@ file class:", return_tensors="pt")
    assert torch.isfinite(model(**prompt).logits).all()


def test_a_run_in_python_is_that_of_the_command_line(tmp_path, teacher_folder, recipe_file, capsys):
    changes = ["baseline=null", "extend=null"]
    run = flashmorph.open_run(str(teacher_folder), tmp_path, recipe=recipe_file, changes=changes)
    results = flashmorph.morph(run)
    run.folder.release()
    assert set(results.scores) == {"teacher", "hybrid_undistilled", "hybrid"} and capsys.readouterr().out == ""
    stages = {path.name for path in (tmp_path / "stages").iterdir()}
    options = [word for change in changes for word in ("--set", change)]
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", tmp_path, *options) == 0
    assert {path.name for path in (tmp_path / "stages").iterdir()} == stages
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.layer_types == layer_types_of(tmp_path)


def layer_types_of(run: Path) -> list[str]:
    """The kinds of layers that a run's plan asks for."""
    kinds = {"full": "full_attention", "linear": "linear_attention"}
    return [kinds[option] for option in Plan.load(run / "plan.json").assignments.values()]


def test_a_recipe_that_is_given_whole_is_not_changed(tmp_path, teacher_folder, recipe_file):
    recipe = flashmorph.load_recipe(recipe_file)
    with pytest.raises(ValueError, match="read by name"):
        flashmorph.open_run(str(teacher_folder), tmp_path / "run", recipe=recipe, changes=["budget=1"])
    assert not (tmp_path / "run").exists()


def test_the_example_of_generate_shows_recall(capsys):
    assert run_command("generate", "tiny", "--max-new-tokens", 8, "--prompt", "@ file class:482139\n? file class:") == 0
    assert "482139" in capsys.readouterr().out
