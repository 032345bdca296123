"""Teachers of the hub: what is fetched of them, and what a dry run does without weights."""

import shutil
from pathlib import Path

import pytest
from conftest import run_command
from local_hub import local_hub
from test_cli import refused
from test_run_owners import change_weights

from flashmorph.convert.teacher import open_teacher, open_without_weights
from flashmorph.errors import UserError

NAME = "some-org/a-teacher"


@pytest.fixture
def bare(tmp_path, teacher_folder) -> Path:
    """A teacher's folder without its weights."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "bare"))
    (folder / "model.safetensors").unlink()
    return folder


def test_a_dry_run_of_a_model_of_the_hub_fetches_no_weights(tmp_path, teacher_folder, recipe_file):
    sharded = Path(shutil.copytree(teacher_folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--dry-run", "--device", "cpu")
    with local_hub(tmp_path / "home", {NAME: {"main": sharded}}) as hub:
        done = hub.command("morph", NAME, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert set(hub.asked) == {path.name for path in teacher_folder.iterdir()} - {"model.safetensors"}
        assert f"the weights of {NAME} were not fetched" in done.stdout and "evaluate" in done.stdout
    assert not (tmp_path / "out").exists() and not list((tmp_path / "home").rglob("*safetensors*"))


def test_a_dry_run_reads_no_weights(tmp_path, teacher_folder, recipe_file, capsys):
    """Of whatever size: their digest alone would take minutes."""
    torn = Path(shutil.copytree(teacher_folder, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes(b"torn")
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--dry-run")
    assert run_command("morph", torn, *options) == 0
    assert "weights" not in capsys.readouterr().out


def test_a_dry_run_needs_a_configuration_and_a_tokenizer_alone(tmp_path, bare, recipe_file, capsys):
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--dry-run", "--json")
    assert run_command("morph", bare, *options) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{bare} has no weights: that they are all there" in printed
    assert "has no safetensors weights" in refused(capsys, "morph", bare, *options[:4])
    opened = open_without_weights(str(bare))
    assert opened.digest == "" and opened.tokenizer_digest and opened.template_digest


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors"])
def test_a_dry_run_refuses_weights_that_a_run_would_refuse(bare, file):
    (bare / file).symlink_to("nowhere") if file == "model.safetensors" else (bare / file).write_bytes(b"x")
    with pytest.raises(UserError) as dry:
        open_without_weights(str(bare))
    with pytest.raises(UserError) as run:
        open_teacher(str(bare))
    assert str(dry.value) == str(run.value)


def test_a_dry_run_says_what_a_folder_of_another_teacher_will_do(tmp_path, teacher_folder, recipe_file, capsys):
    run, other = tmp_path / "run", Path(shutil.copytree(teacher_folder, tmp_path / "other"))
    change_weights(other)
    assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", run) == 0
    for teacher, says in ((other, True), (teacher_folder, False)):
        capsys.readouterr()
        assert run_command("morph", teacher, "--recipe", recipe_file, "--output", run, "--dry-run") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert (f"refused for {other}, unless the weights are the same" in printed) == says
