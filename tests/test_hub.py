"""Teachers of the hub: what is fetched of them, and what a dry run does without weights."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_command
from local_hub import commit_of, local_hub
from test_cli import refused
from test_run_owners import change_weights

from flashmorph.convert.teacher import open_teacher, open_without_weights
from flashmorph.errors import UserError
from flashmorph.report.kept import keep

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


@pytest.fixture
def two_revisions(tmp_path, teacher_folder) -> dict[str, Path]:
    """A model whose branch `main` has other weights than its tag `v1` and the pull request."""
    older, newer = (Path(shutil.copytree(teacher_folder, tmp_path / name)) for name in ("older", "newer"))
    change_weights(newer)
    (older / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    return {"main": newer, "v1": older, "refs/pr/7": older}


def test_a_revision_of_a_model_is_taken_by_branch_tag_or_commit(tmp_path, two_revisions):
    older, newer = (open_teacher(str(two_revisions[name])).digest for name in ("v1", "main"))
    commits = {name: commit_of(folder) for name, folder in two_revisions.items()}
    assert older != newer and commits["v1"] == commits["refs/pr/7"] != commits["main"]
    wanted = {"": "main", "@main": "main", "@v1": "v1", "@refs/pr/7": "v1", "@refs%2Fpr%2F7": "v1"}
    wanted |= {f"@{commits[name]}": name for name in ("main", "v1")}
    script = f"""
from flashmorph.convert.teacher import open_teacher
for revision in {list(wanted)}:
    teacher = open_teacher({NAME!r} + revision)
    print(teacher.name, teacher.revision, teacher.digest)
"""
    opened = [f"{NAME} {commits[name]} {older if name == 'v1' else newer}" for name in wanted.values()]
    with local_hub(tmp_path / "home", {NAME: two_revisions}) as hub:
        for offline in (False, True):
            done = hub.python("-c", script, offline=offline)
            assert done.stdout.splitlines() == opened, done.stderr


def test_a_revision_that_is_not_there_is_one_sentence(tmp_path, teacher_folder):
    script = f"""
from flashmorph.convert.teacher import open_config
from flashmorph.errors import UserError
for name in ("{NAME}@v9", "{NAME}@", "some-org/none@v1"):
    try:
        open_config(name)
    except UserError as error:
        print(error)
"""
    with local_hub(tmp_path / "home", {NAME: {"main": teacher_folder}}) as hub:
        done = hub.command("transplant", f"{NAME}@v9", "--output", tmp_path / "out")
        missing, empty, unknown = hub.python("-c", script).stdout.splitlines()
    assert done.returncode == 2 and done.stderr == f"error: {missing}\n"
    assert f"the hub's {NAME} has no branch, tag or commit 'v9'" in missing
    assert f"names no revision: {NAME}@REVISION takes a branch, tag or commit" in empty
    assert "the hub has none of that name" in unknown
    assert not (tmp_path / "out").exists()


def test_a_local_path_may_have_an_at_sign(tmp_path, teacher_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_folder, tmp_path / "org" / "name@v1")
    opened = open_teacher("org/name@v1")
    assert (opened.name, opened.revision) == ("org/name@v1", "") and opened.digest
    assert run_command("estimate", "org/name@v1", "--recipe", "demo") == 0
    for gone in ("./name@v1", "/nowhere/name@v1", "one/two/three@v1"):
        assert "there is no folder" in refused(capsys, "estimate", gone)


def test_card_plan_and_report_name_the_model_and_its_revision_apart(tmp_path, two_revisions, recipe_file):
    commit, out = commit_of(two_revisions["v1"]), tmp_path / "out"
    options = ("--recipe", recipe_file, "--layers", "0", "--device", "cpu", "--output", out)
    with local_hub(tmp_path / "home", {NAME: two_revisions}) as hub:
        done = hub.command("morph", f"{NAME}@v1", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        again = hub.command("morph", f"{NAME}@{commit}", *options, offline=True)
        assert again.returncode == 0 and again.stdout.count("done before") > 5, again.stdout + again.stderr
        other = hub.command("morph", NAME, *options)
        assert other.returncode == 2 and f"is a run of the teacher {NAME}@{commit}" in other.stderr
    card, plan, page = ((out / name).read_text() for name in ("README.md", "plan.json", "report.html"))
    assert f"base_model: {NAME}\n" in card and f"Made from `{NAME}` at revision `{commit}`" in card
    assert f"license: other\nlicense_link: https://huggingface.co/{NAME}/blob/{commit}/LICENSE\n" in card
    assert f"flashmorph morph {NAME}@{commit} --recipe recipe.yaml" in card
    assert json.loads(plan)["teacher"] == NAME and json.loads(plan)["revision"] == commit
    assert f"flashmorph evaluate {NAME}@{commit} " in page
    snapshots = {
        name: next((tmp_path / "home").rglob(f"snapshots/{commit_of(two_revisions[name])}")) for name in ("v1", "main")
    }
    folders = {f"{NAME}@v1": snapshots["v1"], f"{NAME}@main": snapshots["main"], str(out): out}
    path = keep(out, "evaluate", {"models": {name: {} for name in folders}}, folders)
    assert list(json.loads(path.read_text())["models"]) == ["teacher", "a-teacher@main", "hybrid"]
