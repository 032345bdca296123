"""Progress where there is no terminal: which lines are printed, when, and where."""

import io
import json
import re

import pytest
from conftest import run_command

from flashmorph.cli import progress_lines
from flashmorph.cli.progress_lines import ProgressLines
from flashmorph.cli.screen import RichScreen
from flashmorph.surface.terminal import Terminal
from flashmorph.units import rough_time


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds_a_step: float, steps: int, start: int = 0, stage: str = "align") -> list[tuple[float, str]]:
    """The lines of a stage of even steps, each with the seconds after which it came."""
    clock = Clock()
    progress, found = ProgressLines(stage, clock), []
    for step in range(start, steps):
        clock.now += seconds_a_step
        if line := progress.line(step + 1, steps, loss=0.5):
            found.append((clock.now - 1_000, line))
    return found


def test_lines_come_at_growing_intervals():
    assert [when for when, _ in lines_of(1, 3_000)] == [30, 60, 120, 300, 900, 1500, 2100, 2700]
    assert lines_of(0.1, 299) == []
    # Steps that are longer than the intervals: one line a step, none is made up for.
    assert [when for when, _ in lines_of(400, 4)] == [400, 1200]
    assert [when for when, _ in lines_of(700, 4)] == [700, 1400, 2100, 2800]


def test_a_line_says_how_far_and_how_long():
    (_, first), *_ = lines_of(1, 3_000)
    assert first == "align      1 % (30 of 3,000) · loss 0.500 · 30 s so far, 50 min left"
    # The pace is that of the steps that were made now, not of those before a resume.
    (_, resumed), *_ = lines_of(10, 1_000, start=900)
    assert resumed.startswith("align      90 % (903 of 1,000)") and resumed.endswith("30 s so far, 16 min left")
    *_, (_, last) = lines_of(100, 27)
    assert last.endswith("45 min so far, 0 s left")


def test_a_share_without_steps_and_a_first_report_without_pace():
    clock = Clock()
    progress = ProgressLines("signal", clock)
    clock.now += 45
    assert progress.line(0.25, 1) == "signal     25 % · 45 s so far"
    clock.now += 60
    assert progress.line(0.5, 1) == "signal     50 % · 2 min so far, 2 min left"
    clock.now += 3_600
    assert ProgressLines("x", clock).line(1, 2) is None
    assert progress.line(0, 0) == "signal     1 h 2 min so far"


def test_another_part_of_a_stage_has_its_own_pace():
    """Rows are read a thousand a second, then steps take ten seconds each."""
    clock = Clock()
    progress = ProgressLines("align", clock)
    for row in (1_000, 2_000):
        clock.now += 1
        assert progress.line(row, 2_000) is None
    lines = []
    for step in range(1, 6):
        clock.now += 10
        lines += filter(None, [progress.line(step, 101, loss=1.0)])
    assert lines == ["align      3 % (3 of 101) · loss 1.000 · 32 s so far, 16 min left"]


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (119, "2 min"), (3_599, "1 h 0 min"), (108_061, "30 h 1 min")],
)
def test_times_in_words(seconds, words):
    assert rough_time(seconds) == words


@pytest.mark.parametrize("terminal, rank, printed", [(False, "0", True), (False, "1", False), (True, "0", False)])
def test_lines_are_for_what_is_no_terminal_and_for_rank_0(monkeypatch, terminal, rank, printed):
    monkeypatch.setenv("RANK", rank)
    shown, clock = io.StringIO(), Clock()
    console = Terminal(file=shown, width=200, force_terminal=terminal, color_system=None, legacy_windows=False)
    with RichScreen(console, clock).stage("distill", "300 steps") as report:
        for step in range(300):
            clock.now += 1
            report(step + 1, 300, loss=2.0)
    assert (re.findall(r"^distill +300 steps · .* so far, \d+ \w+ left", shown.getvalue(), re.M) != []) is printed


def test_json_has_stdout_for_itself(tmp_path, monkeypatch, capsys, teacher_folder, recipe_file):
    """Also where each report of a whole run is due a line."""
    monkeypatch.setattr(progress_lines, "_FIRST_SECONDS", (1e-6,))
    monkeypatch.setattr(progress_lines, "_LATER_SECONDS", 1e-6)
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "run", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["hybrid"]["recall"] >= 0
    for stage in ("align", "select", "distill", "evaluate"):
        assert re.search(rf"^{stage} +[^ ].* · \d+ %.* so far", printed.err, re.MULTILINE)
