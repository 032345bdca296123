"""The recipe `laptop` on a random Llama of two layers, with windows and with linear branches."""

import json

import pytest
from conftest import run_command, tiny_tokenizer
from families import random_teacher

FEW = {
    "align.tokens": 256,
    "align.length": 64,
    "align.batch_tokens": 128,
    "select.require_signal": "false",
    "select.search.length": 128,
    "select.search.batch_tokens": 256,
    "select.search.questions": 4,
    "distill.tokens": 256,
    "distill.length": 128,
    "distill.batch_tokens": 128,
    "evaluate.questions": 2,
    "evaluate.length": 128,
    "evaluate.perplexity_tokens": 256,
    "tasks.eight_keys.num_keys": 2,
}


@pytest.mark.parametrize("form", ["window", "linear"])
def test_it_goes_through_the_whole_path_with_the_default_search(form, tmp_path):
    teacher = tmp_path / "teacher"
    random_teacher("llama: grouped", vocab_size=len(tiny_tokenizer())).save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    changes = FEW | ({"host.window": 32} if form == "window" else {})
    settings = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    run = tmp_path / "run"
    command = ["morph", teacher, "--recipe", "laptop", "--data", "demo", "--baseline", "uniform", "--output", run]
    assert run_command(*command, *settings) == 0
    results = json.loads((run / "results.json").read_text())
    switched = {"window": "sliding", "linear": "linear"}[form]
    assert sorted(results["layers"]["assignments"].values()) == ["full", switched]
    assert {"teacher", "hybrid", "hybrid_undistilled", "uniform", "uniform_undistilled"} <= results.keys()
    assert json.loads((run / "plan.json").read_text())["strategy"] == "budgeted-gates"
