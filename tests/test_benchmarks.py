"""Benchmarks that need a GPU run at toy size without one, and say that they measured nothing."""

import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_without_a_gpu_the_gpus_benchmark_runs_and_says_that_it_measured_nothing(tmp_path, monkeypatch, capsys):
    output = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--toy", "--gpu", "h200", "--output", str(output)])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "align, gates, distill, contexts ran at toy size on cpu. This measured nothing." in printed
    assert not output.exists()
