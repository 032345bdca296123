"""Benchmarks that need a GPU run at toy size without one, and say that they measured nothing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert f"{parts} ran at toy size on cpu. This measured nothing." in printed
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    "part, code, said",
    [
        ("kernels", 0, "skipped"),
        ("speed", 0, "ran at toy size on cpu. This measured nothing."),
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
