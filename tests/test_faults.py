"""Runs that die at a rename go on, and end with the same weights; finished stages that are damaged are named."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import FEW_STEPS, run_command
from safetensors.torch import load_file

from flashmorph.errors import UserError
from flashmorph.files import atomic_path
from flashmorph.run.folder import RunFolder

RECIPE = {**FEW_STEPS, "baseline": None, "tasks": {"one_key": FEW_STEPS["tasks"]["one_key"]}}


class Killed(BaseException):
    """Stands for a kill: nothing in flashmorph catches it."""


class Killer:
    """Dies once right before each kind of rename of ours, and right after those of models and whole stages."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[str, str, str]] = []
        self._run, self._replace = run, os.replace
        monkeypatch.setattr(os, "replace", self._die_or_replace)

    def _die_or_replace(self, source, target, **arguments):
        caller = sys._getframe(1).f_globals["__name__"]
        point = (caller, self._what(Path(target)))
        if not caller.startswith("flashmorph."):
            return self._replace(source, target, **arguments)
        if (*point, "before") not in self.seen:
            self.seen.append((*point, "before"))
            raise Killed
        self._replace(source, target, **arguments)
        if point[1].endswith(("/finished", "/model")) and (*point, "after") not in self.seen:
            self.seen.append((*point, "after"))
            raise Killed

    def _what(self, target: Path) -> str:
        """A stage's own end, its model and the first of its other files; of what is published the first."""
        parts = target.relative_to(self._run).parts
        if parts[0] != "stages":
            return parts[0] if parts[0] in ("data", "flashmorph.json") else "published"
        stage = parts[1].split("-")[0]
        ends = ("model", "branches.safetensors", "plan.json", "stage.json", "spent.json")
        inside = parts[2] if len(parts) == 3 and parts[2] in ends else "more"
        return f"{stage}/{inside if len(parts) > 2 else 'finished'}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_folder, recipe) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_command("morph", teacher_folder, "--recipe", recipe, "--output", folder) == 0
    return folder


@pytest.fixture
def finished(tmp_path, whole) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_run_that_dies_at_every_rename_ends_with_the_same_weights(
    tmp_path, whole, teacher_folder, recipe, monkeypatch
):
    folder = tmp_path / "run"
    folder.mkdir()
    killer = Killer(folder, monkeypatch)
    for _ in range(200):
        try:
            assert run_command("morph", teacher_folder, "--recipe", recipe, "--output", folder) == 0
            break
        except Killed:
            continue
    stages = {what.split("/")[0] for _, what, _ in killer.seen if "/" in what}
    assert stages >= {"transplant", "align", "select", "build", "distill", "extend", "evaluate"}
    assert {what for _, what, _ in killer.seen} >= {f"{stage}/finished" for stage in stages}
    assert {"flashmorph.files", "flashmorph.data.rows", "flashmorph.run.folder"} <= {
        caller for caller, _, _ in killer.seen
    }
    ours, theirs = load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert not list(folder.rglob("*.part*")) and not list(folder.rglob("checkpoints"))


def test_a_stage_that_had_saved_its_model_trains_no_more(finished, teacher_folder, recipe, monkeypatch):
    (stage,) = finished.glob("stages/extend-*")
    stage.rename(stage.with_name(stage.name + ".partial"))
    (stage.with_name(stage.name + ".partial") / "stage.json").unlink()
    import flashmorph.pipeline.training as pipeline

    monkeypatch.setattr(pipeline, "extend", lambda *arguments: pytest.fail("it trains again"))
    assert run_command("morph", teacher_folder, "--recipe", recipe, "--output", finished) == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"cut": _cut, "gone": Path.unlink, "changed": _change, "empty": lambda path: path.write_bytes(b"")}
FILES = (
    "transplant-*/model/config.json",
    "align-*/branches.safetensors",
    "select-*/plan.json",
    "build-*/model/model.safetensors",
    "distill-*/log.jsonl",
    "extend-*/model/model.safetensors",
    "evaluate-*/right.json",
    "extend-*/stage.json",
)


def _find(folder: Path, stage: Path, record: dict) -> None:
    held = RunFolder(folder)
    try:
        held.find(record["stage"], record["settings"], record["inputs"])
        assert stage.is_dir()
    finally:
        held.release()


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stage_is_named(finished, pattern, damage):
    if (pattern, damage) == ("extend-*/stage.json", "changed"):
        pytest.skip("a record lists the other files")
    path = sorted(finished.glob(f"stages/{pattern}"))[0]
    stage = finished / "stages" / path.relative_to(finished).parts[1]
    record = json.loads((stage / "stage.json").read_text())
    _find(finished, stage, record)
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="remove that folder") as told:
        _find(finished, stage, record)
    assert str(stage) in str(told.value) and "--from" not in str(told.value)


def test_a_damaged_stage_leaves_what_is_published_and_runs_again_once_removed(finished, teacher_folder, recipe, capsys):
    (path,) = finished.glob("stages/extend-*/model/model.safetensors")
    published = {each: each.read_bytes() for each in finished.iterdir() if each.is_file()}
    _cut(path)
    again = ("morph", teacher_folder, "--recipe", recipe, "--output", finished)
    assert run_command(*again) == 2
    assert path.parent.parent.name in "".join(capsys.readouterr().err.split())
    assert {each: each.read_bytes() for each in finished.iterdir() if each.is_file()} == published
    shutil.rmtree(path.parent.parent)
    assert run_command(*again) == 0
    assert (finished / "model.safetensors").read_bytes() == published[finished / "model.safetensors"]


def test_a_damaged_stage_of_another_run_is_left_out_with_from(tmp_path, finished, teacher_folder, recipe, capsys):
    (path,) = finished.glob("stages/align-*/branches.safetensors")
    _cut(path)
    new = ("morph", teacher_folder, "--recipe", recipe, "--output", tmp_path / "new")
    assert run_command(*new, "--from", finished) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "branches.safetensors" in error and f"leave out --from {finished}" in error


def test_a_record_without_its_list_of_files_is_damaged(finished):
    path = next(finished.glob("stages/extend-*/stage.json"))
    record = json.loads(path.read_text())
    del record["files"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="files: field required"):
        _find(finished, path.parent, record)


def test_a_finished_stage_has_no_checkpoints_even_if_killed_before_they_went(finished):
    (stage,) = finished.glob("stages/distill-*")
    (stage / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    held = RunFolder(finished)
    assert not (stage / "checkpoints").exists()
    del held


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine").write_text("kept")

    def write(**options) -> None:
        with atomic_path(target, **options) as temporary:
            temporary.mkdir()
            (temporary / "new").write_text("new")

    with pytest.raises(ValueError, match="cannot write"):
        write()
    assert (target / "mine").read_text() == "kept"
    write(over_folder=True)
    assert [path.name for path in target.iterdir()] == ["new"]


def test_an_error_is_the_targets_only_where_it_is_about_it(tmp_path):
    """While a checkpoint is written its teacher is read, whose faults must not be blamed on the output."""
    missing = tmp_path / "teacher.safetensors"
    with pytest.raises(FileNotFoundError) as error, atomic_path(tmp_path / "out"):
        missing.read_bytes()
    assert error.value.filename == str(missing)
    with pytest.raises(UserError, match="cannot write .*out: No such file"), atomic_path(tmp_path / "out") as temporary:
        (temporary / "shard").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write .*out: No space left"), atomic_path(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_seconds_keeps_the_error_of_the_work(tmp_path):
    def work(folder: Path) -> None:
        (folder / "spent.json").mkdir()
        (folder / "spent.json" / "in the way").touch()
        raise RuntimeError("the loss is not finite")

    with pytest.raises(RuntimeError, match="the loss is not finite"):
        RunFolder(tmp_path).run("align", {}, [], work)


def test_cut_rows_are_made_again(finished, teacher_folder, recipe):
    rows = sorted(finished.glob("data/distill-*.npy"))[0]
    before = rows.read_bytes()
    _cut(rows)
    shutil.rmtree(next(iter(finished.glob("stages/distill-*"))))
    assert run_command("morph", teacher_folder, "--recipe", recipe, "--output", finished) == 0
    assert rows.read_bytes() == before
    assert np.load(rows).dtype == np.uint32


def test_cut_held_out_text_and_a_damaged_marker_are_made_again(finished, teacher_folder, recipe):
    (text,) = finished.glob("data/test-*.npz")
    before, marker, results = text.read_bytes(), finished / "flashmorph.json", (finished / "results.json").read_bytes()
    labels = json.loads(marker.read_text())["last"].keys()
    _cut(text)
    marker.write_text('{"last": ["align"]}')
    shutil.rmtree(next(iter(finished.glob("stages/evaluate-*"))))
    assert run_command("morph", teacher_folder, "--recipe", recipe, "--output", finished) == 0
    assert text.read_bytes() == before and json.loads(marker.read_text())["last"].keys() == labels
    again, then = json.loads((finished / "results.json").read_text()), json.loads(results)
    assert all(again[name] == then[name] for name in ("teacher", "hybrid"))
