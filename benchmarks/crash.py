"""Kill a run in every way, start it again each time, and compare its weights with an undisturbed run's.

    python benchmarks/crash.py --kills 50 --disks 20 --output runs/crash

The demo at a small size, or `--teacher` with a `--recipe` of your own. Three kinds of disturbance, all of which must
end with the same weights, to the last bit:

- `renames`: killed by SIGKILL right before each kind of file or folder of the run is renamed or removed;
- `random`: killed at random moments, by SIGKILL, SIGTERM and SIGINT in turn, of which the last two must end the run
  with one sentence and 143 or 130;
- `full`: the disk is full, and a little larger each time (Linux: a tmpfs in a mount namespace of its own), which must
  end the run with one sentence and 2.

A run that gets to its end before it was killed often enough makes room for another one, in a folder of its own. Writes
`--results`, by default `benchmarks/results/crash.json`.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from flashmorph.files import write_json
from flashmorph.surface.interrupts import SENTENCE

SMALL = {
    "align": "{tokens: 65536, length: 256, batch_tokens: 2048, retrieval_share: 0.5, learning_rate: 2.0e-3, "
    "checkpoint_steps: 4}",
    "select.settings": "{steps: 30}",
    "select.search.questions": "8",
    "distill.tokens": "32768",
    "distill.checkpoint_steps": "2",
    "extend.tokens": "16384",
    "extend.checkpoint_steps": "2",
    "evaluate": "{questions: 4, length: 256, perplexity_tokens: 2048, batch_tokens: 2048}",
}
"""The demo in a minute or two, with checkpoints close together."""
PROCESSES = get_context("forkserver")
EVENTS = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}
"""What a run is killed before: Python's audit events, and which of their arguments is the path."""
SOON_SECONDS = 0.3
"""By then a command that has just been started listens for signals."""
FULL = """
mount -t tmpfs -o size=16k tmpfs "$DISK" || exit 1
for size in $SIZES; do
    mount -o remount,size=$size tmpfs "$DISK"
    "$@" >/dev/null 2>"$ERRORS/$size.txt"
    echo $? >"$ERRORS/$size.code"
done
cp "$DISK/run/model.safetensors" "$ERRORS"
"""
"""One run on a disk that grows. The disk is gone when the shell ends."""


class Runs:
    """Runs of one command, each in its own folder, until they have been killed often enough."""

    def __init__(self, command: list[str], output: Path, name: str):
        self.kills: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.folders: list[Path] = []
        self._command, self._output, self._name = command, output, name
        self._errors = output / f"{name}.stderr"

    def begin(self) -> Path:
        """A folder for the next run."""
        self.folders.append(self._output / f"{self._name}-{len(self.folders)}")
        return self.folders[-1]

    def start(self, seen: Path | None = None) -> BaseProcess:
        """The command at work in the newest folder, in a process of its own that has only imported things."""
        arguments = ([*self._command, "--output", str(self.folders[-1])], self._errors, self.folders[-1], seen)
        process = PROCESSES.Process(target=work, args=arguments)
        process.start()
        return process

    def ended(self, process: BaseProcess, expected: tuple[int, ...], sentence: str = "") -> None:
        """Note a process that ended with another code, or said something else than one sentence."""
        text = self._errors.read_text(errors="replace")
        if process.exitcode not in expected or "Traceback" in text or sentence not in text:
            self.wrong.append(f"exit code {process.exitcode}, not {expected}: {text[-500:]!r}")

    def compared(self, whole: Path) -> dict[str, Any]:
        """What is written of them."""
        same = [same_weights(whole, folder / "model.safetensors") for folder in self.folders]
        return {
            "kills": len(self.kills),
            "killed_at_work_on": dict(Counter(kill["at_work_on"] for kill in self.kills).most_common()),
            "runs": len(same),
            "runs_with_the_same_weights": sum(same),
            "ended_otherwise": self.wrong,
            "each_kill": self.kills,
        }


def main() -> None:
    """Run, kill, run again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="at random moments")
    parser.add_argument("--disks", type=int, default=20, help="sizes of the full disk")
    parser.add_argument("--skip-renames", action="store_true", help="do not kill before every rename")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--recipe", type=Path, help="default: the demo at a small size")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/crash.json"))
    arguments = parser.parse_args()
    PROCESSES.set_forkserver_preload(["flashmorph.pipeline.morph"])
    command = ["flashmorph", "morph", arguments.teacher, "--recipe", str(arguments.recipe or "demo")]
    if not arguments.recipe:
        command += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    arguments.output.mkdir(parents=True)
    undisturbed = Runs(command, arguments.output, "whole")
    folder, started = undisturbed.begin(), time.perf_counter()
    process = undisturbed.start()
    process.join()
    undisturbed.ended(process, (0,))
    if undisturbed.wrong:
        sys.exit(undisturbed.wrong[0])
    seconds, whole = time.perf_counter() - started, folder / "model.safetensors"
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "seconds_undisturbed": round(seconds, 1)}
    if not arguments.skip_renames:
        results["renames"] = tell(killed_at_renames(command, arguments.output).compared(whole), "renames")
    if arguments.kills:
        chance = random.Random(arguments.seed)
        runs = killed_at_random(command, arguments.output, arguments.kills, chance, seconds)
        results["random"] = tell(runs.compared(whole), "random")
    if arguments.disks:
        results["full"] = tell(full_disks(command, arguments.output, arguments.disks, folder), "full")
    write_json(arguments.results, results)
    parts = [part for part in results.values() if isinstance(part, dict)]
    sys.exit(any(part["runs"] > part["runs_with_the_same_weights"] or part["ended_otherwise"] for part in parts))


def tell(part: dict[str, Any], name: str) -> dict[str, Any]:
    """Print what one kind of disturbance led to."""
    shown = {key: value for key, value in part.items() if key != "each_kill"}
    print(f"{name}: {shown}", flush=True)
    return part


def work(command: list[str], errors: Path, folder: Path, seen: Path | None) -> None:
    """What the process does; with a file of points `seen`, until it comes to one that is not in there."""
    # Of a script in the background the shell has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.stdout = command, open(os.devnull, "w")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if seen is not None:
        sys.addaudithook(Killer(folder, seen))
    from flashmorph.__main__ import main

    main()


class Killer:
    """Kills its own process before a kind of file or folder is renamed or removed for the first time."""

    def __init__(self, folder: Path, seen: Path):
        self._folder, self._seen = folder.absolute(), seen
        self._points = set(seen.read_text().splitlines()) if seen.exists() else set()

    def __call__(self, event: str, arguments: tuple) -> None:
        """Python is about to do something."""
        if event not in EVENTS:
            return
        path = Path(os.fsdecode(arguments[EVENTS[event]]))
        # What stands within a folder that is removed comes by its bare name.
        if path.is_absolute() and not path.is_relative_to(self._folder):
            return
        name = str(path.relative_to(self._folder)) if path.is_absolute() else str(path)
        point = f"{event} {re.sub(r'[0-9a-f]{12,}|[0-9]+', '#', name)}"
        if point not in self._points:
            with self._seen.open("a") as stream:
                stream.write(point + "\n")
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at_renames(command: list[str], output: Path) -> Runs:
    """Runs until one gets to its end without coming to a new point."""
    runs, seen, new = Runs(command, output, "renames"), output / "points.txt", True
    while new:
        new, ended = False, False
        folder = runs.begin()
        while not ended:
            process = runs.start(seen)
            process.join()
            if ended := process.exitcode != -signal.SIGKILL:
                runs.ended(process, (0,))
            else:
                runs.kills.append({"at_work_on": seen.read_text().splitlines()[-1], "folder": folder.name})
                new = True
    return runs


def killed_at_random(command: list[str], output: Path, most: int, chance: random.Random, seconds: float) -> Runs:
    """Runs until so many were killed, each after up to half of the seconds that an undisturbed run takes."""
    runs = Runs(command, output, "random")
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    while len(runs.kills) < most:
        folder, ended = runs.begin(), False
        while not ended:
            process, after = runs.start(), chance.uniform(SOON_SECONDS, max(1.0, seconds / 2))
            process.join(after if len(runs.kills) < most else None)
            if ended := not process.is_alive():
                runs.ended(process, (0,))
                continue
            number = signals[len(runs.kills) % len(signals)]
            assert process.pid
            os.kill(process.pid, number)
            process.join()
            if ended := process.exitcode == 0:  # It was done before the signal reached it.
                runs.ended(process, (0,))
                continue
            if number == signal.SIGKILL:
                runs.ended(process, (-number,))
            else:
                runs.ended(process, (128 + number,), SENTENCE)
            runs.kills.append(
                {
                    "seconds": round(after, 2),
                    "signal": number.name,
                    "folder": folder.name,
                    "at_work_on": at_work_on(folder),
                }
            )
    return runs


def full_disks(command: list[str], output: Path, number: int, undisturbed: Path) -> dict[str, Any]:
    """One run on a disk of so many sizes, from almost nothing to almost enough, and then of one that is enough."""
    disk, errors = (output / "disk").absolute(), (output / "full").absolute()
    for folder in (disk, errors):
        folder.mkdir()
    enough = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    sizes = [enough * (index + 1) // (number + 1) for index in range(number)] + [4 * enough]
    environment = {**os.environ, "DISK": str(disk), "ERRORS": str(errors), "SIZES": " ".join(map(str, sizes))}
    run = [sys.executable, "-m", *command, "--output", str(disk / "run")]
    if not shutil.which("unshare"):
        sys.exit("the full disk needs Linux's unshare; leave it out with --disks 0")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", *run], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"no disk could be made ({done.stderr.strip()}); leave it out with --disks 0")
    wrong, codes = [], {}
    for size in sizes:
        text, code = (errors / f"{size}.txt").read_text(), int((errors / f"{size}.code").read_text())
        codes[size] = code
        # A disk that is almost large enough may be enough: checkpoints come and go.
        says = "No space left" in text or "its checkpoints need" in text
        if code not in (0, 2) or "Traceback" in text or (code == 2) != says:
            wrong.append(f"{size:,} bytes: exit code {code}: {text[-500:]!r}")
    same = same_weights(undisturbed / "model.safetensors", errors / "model.safetensors")
    return {
        "sizes": codes,
        "full": sum(code == 2 for code in codes.values()),
        "runs": 1,
        "runs_with_the_same_weights": int(same),
        "ended_otherwise": wrong,
    }


def at_work_on(folder: Path) -> str:
    """The stage, or the rows of a stage, that a killed run was at work on."""
    at_work = [*folder.glob("stages/*.partial"), *folder.glob("data/*.partial")]
    if not at_work:
        return "something between stages"
    newest = max(at_work, key=lambda path: path.stat().st_mtime)
    return newest.name.split("-")[0] + (" rows" if newest.parent.name == "data" else "")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


if __name__ == "__main__":
    main()
