"""Runs that are killed, and what they touch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import FEW_STEPS

from flashmorph.run.folder import RunFolder

CRASH = Path(__file__).parent.parent / "benchmarks" / "crash.py"
OWN_CACHES = {".cache", ".config"}
"""Where libraries keep what they have downloaded or computed, such as the list of fonts."""


def _own_mounts() -> bool:
    mount = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
    return bool(shutil.which("unshare")) and subprocess.run(mount, capture_output=True).returncode == 0


def _crash(folder: Path, teacher: Path, *options: str, budget: str = FEW_STEPS["budget"]) -> dict:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**FEW_STEPS, "budget": budget, "baseline": None, "extend": None}))
    command = [sys.executable, CRASH, "--skip-renames", "--teacher", teacher, "--recipe", recipe, *options]
    command += ["--output", folder / "runs", "--results", folder / "crash.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "crash.json").read_text())


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_weights(tmp_path, teacher_folder):
    results = _crash(tmp_path, teacher_folder, "--kills", "3", "--disks", "0")["random"]
    assert results["kills"] == 3 and results["runs"] == results["runs_with_the_same_weights"] > 0
    assert {kill["signal"] for kill in results["each_kill"]} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert not list(tmp_path.glob("runs/random-*/**/*.part*"))


def test_a_run_by_heads_that_is_killed_ends_with_the_same_weights(tmp_path, teacher_folder):
    results = _crash(tmp_path, teacher_folder, "--kills", "3", "--disks", "0", budget="heads=2")["random"]
    assert results["kills"] == 3 and results["runs"] == results["runs_with_the_same_weights"] > 0


@pytest.mark.skipif(not _own_mounts(), reason="needs Linux's unshare, and to be allowed to mount")
def test_a_run_on_a_disk_that_is_full_goes_on_when_there_is_room(tmp_path, teacher_folder):
    results = _crash(tmp_path, teacher_folder, "--kills", "0", "--disks", "3")["full"]
    assert results["full"] > 0 and results["runs_with_the_same_weights"] == 1


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
