"""Ctrl-C and SIGTERM at any moment: the sentence, the exit code, no hang, no harm. And what would never end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_command, tiny_tokenizer
from safetensors.torch import load_file

from flashmorph.cli import screen
from flashmorph.cli.screen import RichScreen
from flashmorph.data.chat import encode_chat
from flashmorph.errors import UserError
from flashmorph.surface.interrupts import ANEW, SENTENCE, Interrupted, listening, time_limit
from flashmorph.surface.terminal import Terminal

SOURCE = str(Path(__file__).parent.parent / "src")
INTERRUPTS = {signal.SIGINT: 130, signal.SIGTERM: 143}
AT_IMPORT = """
import builtins, os, runpy, sys
importing = builtins.__import__
def kill_at(name, *more, **others):
    if name.split(".")[0] == {module!r}:
        builtins.__import__ = importing
        os.kill(os.getpid(), {number})
    return importing(name, *more, **others)
builtins.__import__ = kill_at
sys.argv = ["flashmorph", *sys.argv[1:]]
runpy.run_module("flashmorph", run_name="__main__", alter_sys=True)
"""
WORKING = """
import hashlib, sys, time
from flashmorph.surface import interrupts
from flashmorph.surface.interrupts import leave, listening
interrupts._PATIENCE_SECONDS = {patience}
def endless():
    print("at work", flush=True)
    while True:
        try:
            {work}
        except BaseException as error:
            print(type(error).__name__, flush=True)
try:
    with listening():
        endless()
except SystemExit as stop:
    leave(stop.code)
"""
CLEANING = """
import sys, time
from pathlib import Path
from flashmorph.files import atomic_path
from flashmorph.surface.interrupts import listening
with listening(), atomic_path(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    print("begun", flush=True)
    time.sleep(60)
"""
IN_A_LIBRARY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
SWALLOWS = "time.sleep(60)"


def start(*command: object, **variables: str) -> subprocess.Popen:
    path = os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    # A test run that was started in the background hands on that SIGINT is ignored.
    return subprocess.Popen([sys.executable, *map(str, command)], preexec_fn=heed_interrupts, **pipes)


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_work(work: str, patience: float, **variables: str) -> subprocess.Popen:
    process = start("-c", WORKING.format(work=work, patience=patience), **variables)
    assert process.stdout and process.stdout.readline() == "at work\n"
    return process


def ended(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    """Exit code, and what stood on stderr."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("number", INTERRUPTS)
@pytest.mark.parametrize(
    "module, command, says",
    [("typer", "hosts", ANEW), ("rich", "morph", SENTENCE), ("torch", "hosts", ANEW), ("transformers", "hosts", ANEW)],
)
def test_while_libraries_are_imported(module, command, says, number):
    process = start("-c", AT_IMPORT.format(module=module, number=int(number)), command)
    assert ended(process) == (INTERRUPTS[number], f"{says}\n")


@pytest.mark.parametrize("number", INTERRUPTS)
def test_inside_of_a_long_call_of_a_library_it_is_heard_at_once(number):
    process = at_work(IN_A_LIBRARY, patience=0.3)
    process.send_signal(number)
    assert process.stderr and process.stderr.readline() == f"{SENTENCE}\n"
    assert ended(process) == (INTERRUPTS[number], "")


@pytest.mark.parametrize("number", INTERRUPTS)
def test_a_library_that_goes_on_is_left_after_a_while(number):
    process = at_work(SWALLOWS, patience=0.5)
    process.send_signal(number)
    assert ended(process) == (INTERRUPTS[number], f"{SENTENCE}\n")


@pytest.mark.parametrize("numbers", [(2, 2), (15, 15), (2, 15)])
def test_a_second_one_leaves_at_once(numbers):
    process = at_work(IN_A_LIBRARY, patience=3600)
    process.send_signal(numbers[0])
    assert process.stderr and process.stderr.readline() == f"{SENTENCE}\n"
    process.send_signal(numbers[1])
    assert ended(process) == (128 + numbers[0], "")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_work_together_leave_and_the_first_speaks(rank):
    for work in (IN_A_LIBRARY, SWALLOWS):
        process = at_work(work, patience=3600, WORLD_SIZE="2", RANK=rank)
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (143, f"{SENTENCE}\n" if rank == "0" else "")


def test_what_is_interrupted_cleans_up(tmp_path):
    process = start("-c", CLEANING, tmp_path / "file")
    assert process.stdout and process.stdout.readline() == "begun\n"
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, f"{SENTENCE}\n")
    assert not any(tmp_path.iterdir())


def test_the_same_command_goes_on_after_it_and_ends_with_the_same_weights(tmp_path, teacher_folder, recipe_file):
    options = ("align", teacher_folder, "--recipe", recipe_file, "--set", "align.tokens=4096", "--output")
    assert run_command(*options, tmp_path / "whole") == 0
    output = tmp_path / "interrupted"
    for number, code in INTERRUPTS.items():
        process = start("-m", "flashmorph", *options, output)
        steps = len(log_of(output))
        while process.poll() is None and len(log_of(output)) < steps + 4:
            time.sleep(0.02)
        process.send_signal(number)
        found, errors = ended(process)
        assert found == code and errors.endswith(f"{SENTENCE}\n") and "Traceback" not in errors
        assert 4 <= len(log_of(output)) < 32
    assert run_command(*options, output) == 0
    (whole,), (other,) = (
        tmp_path.glob(f"{name}/stages/align-*/branches.safetensors") for name in ("whole", output.name)
    )
    weights = load_file(whole)
    assert all((weights[name] == weight).all() for name, weight in load_file(other).items()) and weights
    assert not list(output.rglob("*.part")) and not list(output.rglob("*.partial"))


def log_of(run: Path) -> list[str]:
    logs = list(run.glob("stages/align-*/log.jsonl"))
    return logs[0].read_text().splitlines() if logs else []


def test_listening_ends_and_a_fork_is_an_ordinary_process():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as raised, listening(), listening():
        child = os.fork()
        if not child:
            while True:
                time.sleep(1)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.05)  # What the child got is not heard here.
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except SystemExit as error:
            raise ImportError("what a library makes of it") from error
    assert raised.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_interrupt_that_a_library_raises_itself(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashmorph.cli.hosts.quiet", interrupted)
    assert run_command("hosts") == 130
    assert capsys.readouterr().err == f"{ANEW}\n"


@pytest.mark.parametrize("arguments", [("hosts",), ("--help",)])
def test_nobody_reads_what_is_printed(arguments):
    process = start("-m", "flashmorph", *arguments)
    assert process.stdout
    process.stdout.close()
    assert process.stderr and process.stderr.read() == ""
    assert process.wait(60) in (0, 1)


def test_what_has_no_end_has_a_limit():
    began = time.monotonic()
    with pytest.raises(UserError, match="too long"), time_limit(0.2, "too long"):
        while True:
            try:
                sum(range(1000))
            except Exception:
                pytest.fail("was told of it")
    assert time.monotonic() - began < 30
    with time_limit(0.2, "too long"):
        pass
    before = time.process_time()
    while time.process_time() - before < 0.3:
        pass


def test_a_template_without_an_end_is_one_sentence(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    limited = time_limit(0.3, "the template does not end")(encode_chat.__wrapped__)
    with pytest.raises(UserError, match="does not end"):
        limited(tokenizer, [{"role": "user", "content": "?"}], False)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert encode_chat(tokenizer, [{"role": "user", "content": "?"}], False)[0]


def test_a_stage_without_news_says_that_it_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(screen, "_SILENT_SECONDS", 0.1)
    with RichScreen(Terminal()).stage("align", "text") as report:
        for _ in range(5):
            time.sleep(0.02)
            report(1, 2)
        said = capsys.readouterr().out
        time.sleep(0.35)
    lines = capsys.readouterr().out.splitlines()
    assert said == "" and 1 <= len(lines) <= 2 and all(line.startswith("align: still at work") for line in lines)


def test_a_panic_in_rust_is_one_sentence(capsys, monkeypatch):
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def fail() -> None:
        raise panic("Onig: retry-limit-in-match over")

    monkeypatch.setattr("flashmorph.cli.hosts.quiet", fail)
    assert run_command("hosts") == 2
    assert "retry-limit" in capsys.readouterr().err
