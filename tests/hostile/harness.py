"""Run one command on one malformed input, in this process, and say what was wrong with how it ended."""

import contextlib
import gc
import hashlib
import io
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

LIMIT_SECONDS = 20.0
LONGEST_SENTENCE = 300
OUTPUT = "out"
"""What a command may write: everything else in a case's folder must be afterwards as it was before."""


@dataclass(frozen=True)
class Case:
    """One input: `prepare` writes it into an empty folder and gives the command's arguments, or a function to call.

    What is written into the folder `out` there is the command's own. `must_refuse` says that nothing else is right
    than a sentence, `must_accept` that nothing is wrong with the input; otherwise the command may do either. Where it
    succeeds, `judge` says what is wrong with what it wrote (given the case's folder; empty where nothing is).
    """

    kind: str
    name: str
    prepare: Callable[[Path], "list[str] | Callable[[], object]"]
    must_refuse: bool = False
    must_accept: bool = False
    judge: Callable[[Path], str] = lambda folder: ""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: its exit code (None where there was none), what was said, and what is wrong, by kind.

    The kinds are `traceback`, `hang`, `harmed`, `words` (no sentence, several, or a long one) and `wrong` (accepted
    what must be refused, or a result that is not right).
    """

    code: int | None
    said: str
    problems: dict[str, str]


class _Hang(BaseException):
    """The time limit; no `except Exception` takes it."""


def run_case(case: Case, folder: Path, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
    """Run a case in `folder`, which is made for it and removed afterwards."""
    folder.mkdir(parents=True)
    try:
        given = case.prepare(folder)
        before = contents(folder)
        code, said, problems = _ended(given, limit_seconds)
        problems |= _words(code, said)
        if case.must_refuse and code == 0:
            problems["wrong"] = "accepted"
        if case.must_accept and code == 2:
            problems["wrong"] = "refused"
        if changed := sorted(before.items() ^ contents(folder).items()):
            problems["harmed"] = str(changed[0][0])
        if code == 0 and (complaint := case.judge(folder)):
            problems["wrong"] = complaint
        return Outcome(code, said, problems)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def failures(cases: Iterable[Case], folder: Path) -> list[str]:
    """A line for every case that did not end as it must; `folder` is where they run."""
    found = []
    for number, case in enumerate(cases):
        outcome = run_case(case, folder / str(number))
        for kind, about in outcome.problems.items():
            found.append(f"{case.kind}, {case.name}: {kind}: {about} [{outcome.code}: {outcome.said[:400]}]")
    return found


def _ended(given: "list[str] | Callable[[], object]", limit_seconds: float) -> tuple[int | None, str, dict[str, str]]:
    """Exit code, what was printed as an error, and what is wrong so far."""
    errors, problems = io.StringIO(), {}
    code: int | None = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            with _time_limit(limit_seconds):
                code = _command(given) if isinstance(given, list) else _call(given)
        except _Hang:
            problems["hang"] = f"not ended after {limit_seconds:g} s"
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = [each for each in traceback.extract_tb(error.__traceback__) if "/flashmorph/" in each.filename]
            place = f"{Path((ours or [frame])[-1].filename).name}:{(ours or [frame])[-1].lineno}"
            problems["traceback"] = f"{type(error).__name__} at {place}: {str(error)[:200]}"
    if "Traceback" in errors.getvalue():
        problems["traceback"] = errors.getvalue()[-300:]
    return code, errors.getvalue(), problems


def _command(arguments: list[str]) -> int:
    """Run `flashmorph` in this process; its exit code."""
    from flashmorph.cli import main

    with mock.patch.object(sys, "argv", ["flashmorph", *map(str, arguments)]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            gc.collect()  # A run holds the lock of its folder until it is gone.
            gc.freeze()  # What is left are libraries; to go through them each time would take longer than the case.
    return 0


def _call(function: Callable[[], object]) -> int:
    """Call a function of the library; its sentence goes where the command line would print it."""
    from flashmorph.errors import UserError

    try:
        function()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _words(code: int | None, said: str) -> dict[str, str]:
    """What is wrong with exit code and sentence: of a refusal one line, not long."""
    if code in (None, 0):
        return {}
    lines = [line for line in said.splitlines() if line.strip()]
    if code != 2:
        return {"words": f"exit code {code}"}
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return {"words": f"{len(lines)} lines on stderr"}
    sentence = lines[0].removeprefix("error: ")
    if len(sentence) >= LONGEST_SENTENCE:
        return {"words": f"{len(sentence)} characters: {sentence}"}
    return {} if sentence.strip() else {"words": "an empty sentence"}


def contents(folder: Path) -> dict[str, str]:
    """What lies in a case's folder apart from the command's own output: a digest of each file, the target of a link."""
    found = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder and OUTPUT in folders:
            folders.remove(OUTPUT)
        for name in [*folders, *files]:
            path = Path(place, name)
            if path.is_symlink():
                state = f"link to {os.readlink(path)}"
            elif path.is_file():
                state = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                state = f"{path.stat().st_mode:o}"
            found[str(path.relative_to(folder))] = state
    return found
