"""An error on one rank or on all, under torchrun: it is printed once, with its rank, and every process ends at once."""

import subprocess
from pathlib import Path

import pytest
from test_ranks import environment, torchrun


def failed(where: str, teacher: Path, recipe: Path, output: Path) -> tuple[int, str]:
    """Exit code and stderr of two ranks that fail there, in far less time than they would wait for each other."""
    command = [Path(__file__).parent / "failing.py", where, "align", teacher, "--recipe", recipe, "--output", output]
    done = subprocess.run(torchrun(*command), env=environment(), capture_output=True, text=True, timeout=900)
    return done.returncode, done.stderr


@pytest.mark.parametrize("ranks, who", [("0", ""), ("1", "rank 1: "), ("01", "")])
def test_a_users_error_ends_all_ranks_and_is_printed_once(ranks, who, teacher_folder, recipe_file, tmp_path):
    code, errors = failed(f"{ranks}:user", teacher_folder, recipe_file, tmp_path / "run")
    assert code == 1 and errors.count("no room here") == 1 and f"error: {who}no room here" in errors


def test_what_rank_0_found_for_all_is_printed_once(teacher_folder, recipe_file, tmp_path):
    code, errors = failed("01:first", teacher_folder, recipe_file, tmp_path / "run")
    assert code == 1 and errors.count("no room here") == 1 and "error: no room here" in errors


def test_a_bug_on_one_rank_ends_all_and_only_its_traceback_is_printed(teacher_folder, recipe_file, tmp_path):
    code, errors = failed("1:bug", teacher_folder, recipe_file, tmp_path / "run")
    assert code == 1 and errors.count("RuntimeError: a bug") == 1
    assert "[rank1]: RuntimeError: a bug" in errors and "[rank0]" not in errors


def test_ranks_leave_the_group_after_success(teacher_folder, recipe_file, tmp_path):
    code, errors = failed("01:success", teacher_folder, recipe_file, tmp_path / "run")
    assert code == 0 and "rank 0 left" in errors and "rank 1 left" in errors
