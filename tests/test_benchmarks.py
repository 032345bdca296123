"""Benchmarks that need a GPU run at toy size without one, and say that they measured nothing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_without_a_gpu_the_gpus_benchmark_runs_and_says_that_it_measured_nothing(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--toy", "--gpu", "h200", "--output", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "align, gates, distill, contexts ran at toy size on the CPU. This measured nothing." in done.stdout
    assert not output.exists()
