"""Files at paths that users name: ours are replaced, others only by force; what is no plain file stays as it is."""

import json
import os
import random
import socket
import stat
from pathlib import Path

import pytest
from conftest import run_command
from matplotlib.figure import Figure
from safetensors import SafetensorError
from test_cli import broken_copy, refused

from flashmorph.errors import UserError
from flashmorph.files import atomic_path, write_json
from flashmorph.run.folder import RunFolder
from flashmorph.surface.outputs import PAGE, PICTURE, claim_folder, claim_output, json_of, made_by, save_picture

OURS = ".flashmorph-0123456789abcdef0123456789abcdef.part"
KINDS = {"plan": json_of("select"), "curve": json_of("select --curve"), "page": PAGE, "picture": PICTURE}


def write_ours(kind: str, path: Path) -> None:
    if kind == "page":
        path.write_text('<!doctype html>\n<html lang="en">\n<meta name="generator" content="flashmorph 9.9">\n')
    elif kind == "picture":
        save_picture(Figure(), path)
    else:
        write_json(path, {**made_by("select --curve" if kind == "curve" else "select"), "more": [1]})


def foreign_files(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Files that are not ours, some of them nearly: empty, random bytes, of our kinds without a mark, talking of us."""
    chance = random.Random(seed)
    starts = [b"", b"{\n", b"<!doctype html>\n", b"\x89PNG\r\n\x1a\n", b'{"version": 1,\n', b"GGUF\x03\0\0\0"]
    inside = [b"", b'"made_by": "someone"', b'<meta name="generator" content="hugo">', b'see "made_by": "flashmorph"']
    paths = []
    for number in range(count):
        path = folder / f"foreign {number}"
        path.write_bytes(chance.choice(starts) + chance.randbytes(chance.choice((0, 9, 9000))) + chance.choice(inside))
        paths.append(path)
    return paths


def state(path: Path) -> tuple:
    """Everything about a path that must stay."""
    found = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(found.st_mode) else None
    return found.st_ino, found.st_mode, found.st_mtime_ns, os.readlink(path) if path.is_symlink() else "", content


def special_paths(folder: Path) -> dict[str, Path]:
    """What is never written to."""
    target = folder / "target"
    write_ours("plan", target)
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(target)
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "to a folder").symlink_to(folder / "folder")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # The name of a socket is short.
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    names = ("folder", "link", "dangling", "to a folder", "fifo", "socket")
    return {name: folder / name for name in names} | {"null": Path("/dev/null")}


@pytest.mark.parametrize("mine", KINDS)
def test_only_a_file_of_the_same_kind_of_ours_is_replaced_unforced(tmp_path, mine):
    for kind in KINDS:
        write_ours(kind, tmp_path / kind)
        if kind == mine:
            claim_output(tmp_path / kind, KINDS[mine], force=False)
        else:
            with pytest.raises(UserError, match="--force"):
                claim_output(tmp_path / kind, KINDS[mine], force=False)
    for path in foreign_files(tmp_path, 60):
        before = state(path)
        with pytest.raises(UserError, match="--force"):
            claim_output(path, KINDS[mine], force=False)
        claim_output(path, KINDS[mine], force=True)
        assert state(path) == before


def test_a_kind_without_a_mark_is_replaced_by_force_only(tmp_path):
    write_ours("plan", tmp_path / "hybrid.gguf")
    with pytest.raises(UserError, match="already there"):
        claim_output(tmp_path / "hybrid.gguf", None, force=False)
    claim_output(tmp_path / "hybrid.gguf", None, force=True)
    claim_output(tmp_path / "new.gguf", None, force=False)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_plain_file_is_never_touched(tmp_path, force):
    for name, path in special_paths(tmp_path).items():
        before = state(path) if name != "null" else path.lstat().st_mode
        for mark in (*KINDS.values(), None):
            with pytest.raises(UserError) as refusal:
                claim_output(path, mark, force)
            assert str(path) in str(refusal.value) and len(str(refusal.value)) < 300
        if name in ("fifo", "socket", "null"):  # Nor by what did not ask before.
            with pytest.raises(UserError, match="give the name of a file"), atomic_path(path):
                pytest.fail("was written")
        assert (state(path) if name != "null" else path.lstat().st_mode) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1"])
def test_streams_are_no_files(name):
    with pytest.raises(UserError, match="--json"):
        claim_output(Path(name), PAGE, force=True)


def test_places_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")

    def says(path: Path) -> str:
        with pytest.raises(UserError) as file:
            claim_output(path, PAGE, force=True)
        with pytest.raises(UserError) as folder:
            claim_folder(path)
        assert "\n" not in str(file.value) + str(folder.value)
        return str(file.value)

    assert "Not a directory" in says(tmp_path / "file" / "below")
    assert "Not a directory" in says(tmp_path / "file" / "far" / "below")
    assert "name too long" in says(tmp_path / ("n" * 300))
    assert "name too long" in says(tmp_path / "missing" / ("ü" * 200))
    assert "name too long" in says(tmp_path / ("n" * 300) / "below")
    monkeypatch.chdir(tmp_path)
    assert "is a folder" in says(Path(""))
    monkeypatch.setattr("os.access", lambda place, mode: False)
    assert f"{tmp_path} cannot be written" in says(tmp_path / "new")
    assert f"{tmp_path} cannot be written" in says(tmp_path / "missing" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["n" * 255, "模型 и 🤗", "two words", "a'b\"c", "[red]", "new\nline", "-o", "~", "%d{}"]
)
def test_names_of_any_kind_can_be_written(tmp_path, name):
    path = tmp_path / "missing" / name
    for _ in range(2):
        claim_output(path, json_of("select"), force=False)
        write_ours("plan", path)
    assert json.loads(path.read_text()) == {"made_by": "flashmorph select", "more": [1]}
    claim_folder(tmp_path / name)
    with atomic_path(tmp_path / name) as temporary:
        temporary.mkdir()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, "missing"])


def test_folders_that_are_not_empty_or_not_there(tmp_path):
    paths = special_paths(tmp_path)
    claim_folder(paths.pop("folder"))
    for path in (*paths.values(), tmp_path):
        before = path.lstat().st_ino
        with pytest.raises(UserError):
            claim_folder(path)
        assert path.lstat().st_ino == before


def test_an_empty_folder_stays_until_the_transplant_has_succeeded(capsys, tmp_path, teacher_folder):
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o750)
    before = empty.stat()
    cut = broken_copy(teacher_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    refused(capsys, "transplant", cut, "--output", empty)
    assert (empty.stat().st_ino, empty.stat().st_mode) == (before.st_ino, before.st_mode) and not any(empty.iterdir())
    assert run_command("transplant", teacher_folder, "--output", empty) == 0
    assert (empty / "model.safetensors").is_file()
    assert "already holds something" in refused(capsys, "transplant", teacher_folder, "--output", empty)


def test_only_what_a_killed_run_was_writing_is_removed(tmp_path):
    run = RunFolder(tmp_path / "run").path
    users = [
        ".notes.part",
        ".rows.npy.0a1b2c3d.part",
        f"x{OURS}",
        f"{OURS}.txt",
        ".flashmorph-notes.part",
        "video.part",
    ]
    places = [run, run / "stages", run / "data" / "deep", run / "compare", run / "mine"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in users:
            (place / name).write_text("the user's own")
        (place / OURS).mkdir()
        (place / OURS / OURS).write_text("half")
    RunFolder(run)
    assert all((place / name).read_text() == "the user's own" for place in places for name in users)
    assert [place.name for place in places if (place / OURS).exists()] == ["mine"]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, teacher_folder, recipe_file) -> Path:
    run = tmp_path_factory.mktemp("runs") / "aligned"
    assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", run) == 0
    return run


def test_plans_and_curves_are_known_again(capsys, tmp_path, teacher_folder, recipe_file, aligned, monkeypatch):
    options = ("select", teacher_folder, "--from", aligned, "--recipe", recipe_file, "--output")
    plan, curve = tmp_path / "plan.json", tmp_path / "curve.json"
    asked = ("--curve", "--recall-questions", 1, "--within", "99%")
    for _ in range(2):
        assert run_command(*options, plan) == 0
        assert run_command(*options, curve, *asked) == 0
    assert run_command("build", teacher_folder, "--recipe", recipe_file, "--output", aligned, "--plan", plan) == 0
    picture = curve.with_suffix(".png").read_bytes()
    capsys.readouterr()
    # Refused before any work.
    monkeypatch.setattr("flashmorph.cli.select.open_run", lambda options: pytest.fail("worked before it asked"))
    weights = teacher_folder / "model.safetensors"
    for path, *more in ((weights,), (curve,), (plan, *asked), (aligned / "flashmorph.json",), ("/dev/null", "--force")):
        before = state(Path(path))
        refused(capsys, *options, path, *more)
        assert state(Path(path))[:2] == before[:2] and state(Path(path))[4] == before[4]
    assert "the curve's picture" in refused(capsys, *options, tmp_path / "new.png", *asked)
    (tmp_path / "own.png").write_bytes(b"a photograph")
    assert "own.png" in refused(capsys, *options, tmp_path / "own.json", *asked)
    assert (tmp_path / "own.png").read_bytes() == b"a photograph"
    assert curve.with_suffix(".png").read_bytes() == picture


def test_force_replaces_a_file_and_nothing_else(capsys, tmp_path, teacher_folder, recipe_file, aligned):
    options = ("select", teacher_folder, "--from", aligned, "--recipe", recipe_file, "--force", "--output")
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    assert "is a link" in refused(capsys, *options, tmp_path / "link")
    assert (tmp_path / "notes").read_text() == "notes"
    assert run_command(*options, tmp_path / "notes") == 0
    assert json.loads((tmp_path / "notes").read_text())["made_by"] == "flashmorph select"


def test_comparisons_do_not_replace_what_is_not_theirs(capsys, tmp_path, teacher_folder, recipe_file):
    run = RunFolder(tmp_path / "run").path
    for name in ("compare.json", "regret.png"):
        (run / "compare").mkdir(exist_ok=True)
        (run / "compare" / name).write_text("the user's own")
        sentence = refused(capsys, "compare", teacher_folder, "--recipe", recipe_file, "--output", run)
        assert name in sentence and "--force" in sentence
        assert (run / "compare" / name).read_text() == "the user's own"
        (run / "compare" / name).unlink()


def test_the_file_of_an_export_is_never_a_device(capsys, tmp_path):
    options = ("export", tmp_path, "--llama-cpp", tmp_path, "--force", "--gguf")
    assert "is a device" in refused(capsys, *options, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk_is_one_sentence_from_safetensors_too(tmp_path):
    """Whose error is none of the system's and has its number in its words."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(UserError, match=r"cannot write .*model: No space left on device"),
        atomic_path(tmp_path / "model"),
    ):
        raise error
    with pytest.raises(SafetensorError), atomic_path(tmp_path / "model"):
        raise SafetensorError("Error while deserializing header")
