"""Names of any kind, wherever they are written: they arrive as they are, and nothing takes them for more."""

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import run_command
from markdown_it import MarkdownIt
from names import for_folders, nasty_names
from rich.table import Table
from test_cli import refused

from flashmorph.cli.screen import RichScreen
from flashmorph.plan import Budget, Plan
from flashmorph.report.charts import Chart, Dots, Heat, Series
from flashmorph.report.interactive import spec
from flashmorph.report.looks import Look
from flashmorph.report.page import Section, page
from flashmorph.report.still import draw
from flashmorph.run.folder import Stage
from flashmorph.surface.quoting import (
    code,
    code_block,
    encodable,
    markdown,
    no_option,
    one_line,
    python_string,
    shell_command,
)
from flashmorph.surface.terminal import Terminal, bold, harmless, stand_in_for_what_cannot_be_shown

NAMES = nasty_names(300)
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202e\ufeff]")
STRIP = Plan({"layers.0": "full", "layers.1": "linear"}, Budget("layers", 1)).strip()


def test_a_terminal_shows_names_and_obeys_none():
    shown = io.StringIO()
    screen = Terminal(file=shown, width=2_000, force_terminal=False)
    for name in NAMES[::2]:
        table = Table("column", title=name)
        table.add_row(name)
        table.add_row(bold(name))
        for thing in (name, table):
            screen.print(thing, soft_wrap=True)
        screen.rule(name)
        RichScreen(screen).done(Stage("align", "0", Path(), {"seconds": 1}), name, name)
        RichScreen(screen).say(name)
    printed = shown.getvalue()
    assert not OBEYED.search(printed)
    letters = "".join(printed.split())
    assert all("".join(harmless(name).split()) in letters for name in NAMES[::2])


def test_a_bar_shows_names():
    for name in NAMES:
        shown = io.StringIO()
        screen = Terminal(file=shown, width=300, force_terminal=True, color_system=None, legacy_windows=False)
        with RichScreen(screen).stage("align", name) as report:
            report(1, 2, loss=0.5)
        text = re.sub(r"\x1b\[\?25[lh]|\x1b\[\d*[AK]|[\r\n]|\x1b\[1?[A-K]|\x1b\[2K", "", shown.getvalue())
        assert not OBEYED.search(text)


def test_errors_about_names_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for some in range(0, len(NAMES), 100):
        sentence = refused(capsys, "estimate", "--", "./no folder" + "".join(NAMES[some : some + 20]))
        assert "./no folder" in sentence and not OBEYED.search(sentence)
    assert "[/]" in refused(capsys, "estimate", "./[/]")
    assert len(refused(capsys, "estimate", "./" + "n" * 4000)) < 400


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_a_character_shows_another(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    stand_in_for_what_cannot_be_shown()
    table = Table(title=STRIP)
    table.add_row("… · ± →", *(name for name in NAMES if "\n" not in name))
    Terminal().print(STRIP, table, *NAMES)
    print(*NAMES, STRIP, "\udcff")
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding, "backslashreplace").splitlines()
    assert lines[0].startswith(STRIP if encoding == "utf-8" else "#.")


def test_shells_and_python_are_given_the_name():
    for name in NAMES:
        words = ["flashmorph", "morph", no_option(name), "--output", "FOLDER"]
        assert shlex.split(shell_command(words)) == words
        assert not no_option(name).startswith("-") and Path(no_option(name)) == Path(name)
        assert ast.literal_eval(python_string(name)) == name
        assert python_string(name).isprintable()
    ours = {"id": os.getpid(), "names": NAMES[::7]}
    echo = shell_command([sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *ours["names"]])
    assert json.loads(subprocess.run(echo, shell=True, capture_output=True, check=True).stdout) == ours["names"]
    half = "half \udcff"
    assert ast.literal_eval(python_string(half)) == half and "\\udcff" in encodable(half)


def test_markdown_has_the_name_as_text_and_as_code():
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for name in NAMES:
        heading, inline, end, opening, paragraph, closing = parser.parse(
            f"# Hybrid of {markdown(name)}.\n\nFrom {code(name)} it is.\n"
        )
        assert {token.type for token in inline.children or []} <= {"text", "text_special"}
        assert "".join(token.content for token in inline.children or []) == f"Hybrid of {one_line(name)}."
        (word,) = [token for token in paragraph.children or [] if token.type != "text"]
        assert (word.type, word.content.strip()) == ("code_inline", one_line(name).strip())
        (block,) = parser.parse(code_block(shell_command(["ls", name]), "sh"))
        assert shlex.split(block.content) == ["ls", name.replace("\r", "\n")]
        table = parser.parse(f"| a | b |\n|---|---|\n| {markdown(name)} | c |\n")
        assert sum(token.type == "td_open" for token in table) == 2


class _Tags(HTMLParser):
    """The tags of a page, and what its scripts hold."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def charts_about(names: list[str]) -> list[Chart]:
    series = [Series(name, [1.0], [0.0], Look("red"), hover=[name]) for name in names]
    heat = Heat(names[0], "x", "y", [*names, "all"], names, [[1.0] * 4] * 3, [[name] * 4 for name in names])
    return [Chart("dots", names[0], names[1], [Dots(names[2], "x", "y", names, series), heat])]


@pytest.mark.parametrize("first", range(0, len(NAMES) - 3, 40))
def test_a_page_shows_names_and_holds_no_tag_of_theirs(monkeypatch, first, tmp_path):
    monkeypatch.setattr("flashmorph.report.page.get_plotlyjs", lambda: "")
    names = NAMES[first : first + 3]
    found = _Tags(page(names[0], "", [Section(names[1], list(charts_about(names)))]))
    plain = _Tags(page("a", "", [Section("b", list(charts_about(["c", "d", "e"])))]))
    assert found.tags == plain.tags
    assert "<" not in found.scripts[0] and "\u2028" not in found.scripts[0]
    assert json.loads(found.scripts[0]) == [spec(panel) for panel in charts_about(names)[0].panels]
    for trace in json.loads(found.scripts[0])[0]["data"]:
        assert "<" not in trace["name"].replace("<br>", "")
    draw(charts_about(names)[0], tmp_path / "dots.png")


def test_a_run_among_names_that_are_hard_to_quote(tmp_path, teacher_folder, recipe_file):
    """On a terminal in ASCII, through every command that a run's names go through."""
    teacher = tmp_path / "[" / "] `x` $y$ |'\"\\ <b>&amp; \n\x1b[31m 模型"
    teacher.parent.mkdir()
    teacher.symlink_to(teacher_folder)
    output = tmp_path / "out [/] `$z$`\n</script>".replace("/", "")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [sys.executable, "-m", "flashmorph", "morph", teacher, "--recipe", recipe_file, "--output", output]
    command += ["--set", "baseline=null", "--set", "extend=null"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("ascii")
    assert "\x1b" not in printed and "\\x1b[31m" in printed and "\\u6a21" in printed and re.search(r"#\.|\.#", printed)
    card = (output / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"][0] == "flashmorph"
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    python, shell = (token.content for token in tokens if token.type == "fence")
    literal = re.search(r"from_pretrained\((.*)\)", python)
    assert literal and ast.literal_eval(literal[1]) == output.name
    assert shlex.split(shell)[:4] == ["flashmorph", "morph", str(teacher), "--recipe"]
    assert one_line(teacher.name) in "".join(each.content for each in tokens[1].children or [])
    found = _Tags((output / "report.html").read_text(encoding="utf-8"))
    assert json.loads(found.scripts[0]) and found.tags.count("script") == 3
    assert run_command("report", output) == 0


def test_every_folder_name_can_be_a_teachers(capsys, tmp_path, teacher_folder, recipe_file):
    for name in for_folders(NAMES)[:: len(NAMES) // 10]:
        (tmp_path / name).symlink_to(teacher_folder)
        assert run_command("estimate", tmp_path / name, "--recipe", recipe_file) == 0
        printed = capsys.readouterr().out
        assert not OBEYED.search(printed)


def test_names_in_no_encoding_are_refused(capsys, tmp_path):
    sentence = refused(capsys, "estimate", f"{tmp_path}/\udcff\udcfe")
    assert "\\udcff\\udcfe" in sentence and "encoding" in sentence
