"""Runs that are killed, and what they touch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import FEW_STEPS

from flashmorph.runfolder import RunFolder

CRASH = Path(__file__).parent.parent / "benchmarks" / "crash.py"
OWN_CACHES = {".cache", ".config"}
"""Where libraries keep what they have downloaded or computed, such as the list of fonts."""


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_weights(tmp_path, teacher_folder):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**FEW_STEPS, "baseline": None, "extend": None}))
    command = [sys.executable, CRASH, "--kills", "3", "--teacher", teacher_folder, "--recipe", recipe]
    command += ["--output", tmp_path / "runs", "--results", tmp_path / "crash.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "crash.json").read_text())
    assert results["kills"] == 3 and results["runs"] == results["runs_with_the_same_weights"] > 0
    assert not list(tmp_path.glob("runs/killed-*/**/*.part*"))


def test_a_run_writes_into_its_folder_only(tmp_path, teacher_folder, recipe_file):
    """Besides the libraries' own caches below the home folder."""
    home, here, temporary = (tmp_path / name for name in ("home", "here", "temporary"))
    for folder in (home, here, temporary):
        folder.mkdir()
    away = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in away}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    source = str(Path(__file__).parent.parent / "src")
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
    before = {path: path.stat().st_mtime_ns for path in teacher_folder.iterdir()}
    command = [sys.executable, "-m", "flashmorph", "morph", teacher_folder, "--recipe", recipe_file]
    command += ["--output", tmp_path / "out", "--set", "baseline=null", "--set", "extend=null"]
    done = subprocess.run(list(map(str, command)), env=environment, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir()) and not list(temporary.iterdir())
    assert {path.name for path in home.iterdir()} <= OWN_CACHES
    assert {path: path.stat().st_mtime_ns for path in teacher_folder.iterdir()} == before
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_killed_in_its_first_moments_is_no_foreign_folder(tmp_path):
    """Killed while it wrote the file that marks the folder as a run."""
    (tmp_path / ".flashmorph-0123456789abcdef0123456789abcdef.part").write_text("{")
    held = RunFolder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "flashmorph.json", "stages", "data"}
    del held
