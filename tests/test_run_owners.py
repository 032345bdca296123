"""Which teacher a run's folder belongs to: another one is refused, before anything in the folder changes."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_command
from safetensors.torch import load_file, save_file
from test_cli import refused

from flashmorph.errors import UserError
from flashmorph.files import read_json, write_json
from flashmorph.run.folder import RunFolder
from flashmorph.run.marker import MARKER, Owner

COMMANDS = {
    "morph": ("--output",),
    "align": ("--output",),
    "build": ("--layers", "0", "--output"),
    "distill": ("--layers", "0", "--output"),
    "extend": ("--layers", "0", "--output"),
    "compare": ("--output",),
    "select": ("--output", "PLAN", "--from"),
}
ONE, OTHER = Owner(name="some/teacher", digest="1" * 12), Owner(name="other/teacher", digest="2" * 12)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, teacher_folder, recipe_file) -> Path:
    run = tmp_path_factory.mktemp("owned") / "run"
    assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", run) == 0
    return run


@pytest.fixture
def run(tmp_path, aligned) -> Path:
    return Path(shutil.copytree(aligned, tmp_path / "run"))


@pytest.fixture
def other(tmp_path, teacher_folder) -> Path:
    """A teacher of the same shape with other weights."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "other"))
    change_weights(folder)
    return folder


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and the time of its last change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("command", COMMANDS)
def test_another_teacher_is_refused_and_nothing_is_touched(
    command, tmp_path, run, other, teacher_folder, recipe_file, capsys
):
    before = content(run)
    options = [tmp_path / "plan.json" if option == "PLAN" else option for option in COMMANDS[command]]
    sentence = refused(capsys, command, other, "--recipe", recipe_file, *options, run)
    assert f"is a run of the teacher {teacher_folder}" in sentence and "another folder" in sentence
    assert content(run) == before


def test_the_same_weights_under_another_path_go_on(tmp_path, run, teacher_folder, recipe_file, capsys):
    copied = shutil.copytree(teacher_folder, tmp_path / "copied")
    assert run_command("align", copied, "--recipe", recipe_file, "--output", run) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert read_json(run / MARKER)["teacher"]["name"] == str(copied)


def test_a_teacher_whose_weights_have_changed_goes_on_beside_the_old_stages(tmp_path, other, recipe_file, capsys):
    run, finished = tmp_path / "own", "stages/*/stage.json"
    options = ("--recipe", recipe_file, "--output", run)
    assert run_command("align", other, *options) == 0
    stages = set(run.glob(finished))
    change_weights(other)
    assert run_command("align", other.parent / "." / other.name, *options) == 0
    assert "settings or inputs differ from" in " ".join(capsys.readouterr().out.split())
    assert stages < set(run.glob(finished))
    moved = other.rename(other.with_name("moved"))
    assert run_command("align", moved, *options) == 0


def test_a_folder_of_an_earlier_version_opens_and_gets_its_teacher(run, teacher_folder, recipe_file, capsys):
    marker = read_json(run / MARKER)
    owner = marker.pop("teacher")
    write_json(run / MARKER, marker)
    assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", run) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert read_json(run / MARKER)["teacher"] == owner
    assert owner["name"] == str(teacher_folder) and len(owner["digest"]) == 12


def test_a_folder_where_nothing_is_finished_is_free(tmp_path):
    RunFolder(tmp_path / "run", teacher=ONE).release()
    RunFolder(tmp_path / "run", teacher=OTHER).release()
    marker = tmp_path / "run" / MARKER
    marker.write_text(json.dumps({**read_json(marker), "last": {"align": f"align-{'0' * 12}"}}))
    with pytest.raises(UserError, match="is a run of the teacher other/teacher"):
        RunFolder(tmp_path / "run", teacher=ONE)
    RunFolder(tmp_path / "run").release()


def test_a_name_is_the_same_by_text_or_by_what_it_leads_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    marker = tmp_path / "run" / MARKER
    for first, second in (("teacher", str(tmp_path / "teacher")), ("./teacher", "teacher"), ("gone", "gone")):
        RunFolder(tmp_path / "run", teacher=Owner(name=first, digest="1" * 12)).release()
        write_json(marker, {**read_json(marker), "last": {"align": f"align-{'0' * 12}"}})
        RunFolder(tmp_path / "run", teacher=Owner(name=second, digest="2" * 12)).release()
        assert read_json(marker)["teacher"] == {"name": second, "digest": "2" * 12}
        shutil.rmtree(tmp_path / "run")
