"""Benchmarks that need a GPU run at toy size without one, and say that they measured nothing; what others compute."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flashmorph.convert.load import load_tokenizer
from flashmorph.convert.teacher import locate
from flashmorph.recipe.questions import held_out, open_questions
from flashmorph.recipe.recipe import load_recipe, with_settings

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "options, parts", [([], "align, gates, distill, contexts"), (["--window", "16"], "gates, distill, contexts")]
)
def test_without_a_gpu_the_gpus_benchmark_runs_and_says_that_it_measured_nothing(
    options, parts, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--toy", "--gpu", "h200", *options, "--output", str(output)])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"{parts} ran at toy size on cpu" in printed and "This measured nothing." in printed
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    "part, code, said",
    [
        ("kernels", 0, "skipped"),
        ("speed", 0, "ran at toy size on cpu"),
        ("demo", 0, "skipped"),
        ("", 2, "bash benchmarks/gpu_check.sh kernels"),
    ],
)
def test_the_check_of_a_gpu_runs_without_one_and_shows_nothing(part, code, said, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(BENCHMARKS / "gpu_check.sh"), *([part] if part else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr and not list(tmp_path.iterdir())


def test_what_llama_cpp_answers_is_judged_as_what_transformers_answers(monkeypatch):
    """`benchmarks/quantised.py` reads its rows back in their order, and losses of predicted tokens only."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    quantised = importlib.import_module("quantised")
    recipe = with_settings(load_recipe("demo"), {"evaluate.questions": 2, "evaluate.perplexity_tokens": 1024})
    tokenizer = load_tokenizer(locate("tiny")[0])
    assert tokenizer
    corpus = recipe.data.corpus
    questions, text = open_questions(recipe, corpus, tokenizer), held_out(recipe, corpus, tokenizer)
    asked = quantised.Asked(tokenizer, [], questions, text)
    rows, results, place = asked.rows(), [], 0
    while place < len(rows):
        new, length = rows[place : place + 2]
        results.append(np.full(new or length - 1, 0 if new else 2.0, np.float32))
        place += 2 + length
    score = asked.score(np.concatenate(results))
    assert score.recall == 0 and score.perplexity == pytest.approx(np.exp(2))
    first = questions["one_key"][0].prompt
    answer = tokenizer(first.references[0] + first.stop, add_special_tokens=False).input_ids
    results[0][: len(answer)] = answer[: len(results[0])]
    assert asked.score(np.concatenate(results)).right["one_key"] == [True, False]


def test_engines_are_compared_within_rounds_and_by_the_blocks_that_were_taken(monkeypatch, tmp_path):
    """The machine is half as fast in the second round: the ratio does not see it. Blocks are as by our arithmetic."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    engines = importlib.import_module("engines")
    monkeypatch.setattr(engines, "SHAPE", {**engines.SHAPE, "vocab_size": 96, "num_hidden_layers": 4})
    made = engines.make(tmp_path, ["windows", "mamba2"], [1], torch.bfloat16, 1024)

    def took(seconds: float, blocks: int) -> dict:
        steps = [seconds / 10, seconds / 10, 99.0]  # One step was interrupted.
        kinds = {"prefill": seconds, "prefill_cpu": seconds, "decode": steps, "decode_cpu": steps}
        return {**kinds, "blocks": blocks}

    # One layer is full and three have windows: four groups of one layer.
    rounds = {"teacher": [took(4.0, 5), took(8.0, 5)], "windows": [took(2.0, 11), took(4.0, 11)]}
    page = 128 * 2 * 3 * 64 * 2
    caches = {"teacher": {"block_bytes": 4 * page}, "windows": {"block_bytes": page}}
    row = engines.row_of({"length": 520, "rounds": rounds}, caches, made, 2)
    assert row["windows"]["prefill_cpu_times_faster"]["rounds"] == [2.0, 2.0]
    assert row["windows"]["decode_times_faster"]["median"] == 2.0
    assert row["windows"]["cache_bytes"] == row["windows"]["our_cache_bytes"] == 11 * page
    assert row["teacher"]["our_cache_bytes"] is None and made["mamba2"].our_cache(520) > 0


@pytest.mark.serving
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no built llama.cpp: make test-serving")
def test_a_teacher_beside_itself_in_every_type(tmp_path, monkeypatch):
    """Twice the same model: the same figures, and fewer bytes by each type."""
    output = tmp_path / "quantised.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    options = ["--llama-cpp", os.environ["LLAMA_CPP"], "--questions", "1", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["quantised.py", str(locate("tiny")[0]), *options])
    runpy.run_path(str(BENCHMARKS / "quantised.py"), run_name="__main__")
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["type"] for row in rows[::2]] == ["f32", "q8_0", "q4_0", "q4_k_m"]
    for teacher, hybrid in zip(rows[::2], rows[1::2], strict=True):
        assert hybrid["minus_teacher"]["perplexity"]["ratio"] == pytest.approx(1, abs=1e-6)
        assert teacher["file_bytes"] == hybrid["file_bytes"]
    sizes = {row["type"]: row["file_bytes"] for row in rows}
    assert sizes["q4_0"] < sizes["q4_k_m"] < sizes["q8_0"] < sizes["f32"]
