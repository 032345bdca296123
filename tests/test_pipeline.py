"""The whole path on a random two-layer teacher, in a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FEW_STEPS

from flashmorph.cli import main


def run(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    sys.argv = ["flashmorph", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "few_steps.yaml"
    path.write_text(yaml.safe_dump(FEW_STEPS))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, recipe) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    assert run("morph", teacher_folder, "--recipe", recipe, "--output", folder) == 0
    return folder


def test_the_whole_path_leaves_a_stock_checkpoint_with_its_evidence(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
    assert sorted(config["layer_types"]) == ["full_attention", "linear_attention"]
    results = json.loads((finished / "results.json").read_text())
    for name in ("teacher", "hybrid_undistilled", "hybrid", "uniform_undistilled", "uniform"):
        low, high = results[name]["recall_interval"]
        assert 0 <= low <= results[name]["recall"] <= high <= 1
        assert results[name]["perplexity"] > 1
    assert results["hybrid"]["cache_bytes"]["131072"] < results["teacher"]["cache_bytes"]["131072"]
    assert {"plan.json", "recipe.yaml", "README.md", "tokenizer.json"} <= {path.name for path in finished.iterdir()}
