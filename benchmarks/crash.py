"""Kill a run at random moments, start it again each time, and compare its weights with an undisturbed run's.

    python benchmarks/crash.py --kills 50 --output runs/crash

The demo at a small size, or `--teacher` with a `--recipe` of your own. A run that gets to its end before there were
enough kills makes room for another one, in a folder of its own. All must end with the same weights, to the last bit.
Writes `--results`, by default `benchmarks/results/crash.json`.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from safetensors.torch import load_file

from flashmorph.files import write_json

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


def main() -> None:
    """Run, kill, run again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--recipe", type=Path, help="default: the demo at a small size")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/crash.json"))
    arguments = parser.parse_args()
    PROCESSES.set_forkserver_preload(["flashmorph.pipeline"])
    command = ["flashmorph", "morph", arguments.teacher, "--recipe", str(arguments.recipe or "demo")]
    if not arguments.recipe:
        command += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    whole, chance = arguments.output / "whole", random.Random(arguments.seed)
    started = time.perf_counter()
    finish(start(command, whole))
    seconds = time.perf_counter() - started
    kills: list[dict] = []
    same: list[bool] = []
    while len(kills) < arguments.kills:
        folder = arguments.output / f"killed-{len(same)}"
        while not run_or_kill(command, folder, chance.uniform(0, seconds / 2), arguments.kills, kills):
            pass
        same.append(same_weights(whole, folder))
        print(f"run {len(same)}: {len(kills)} kills so far, {'the same' if same[-1] else 'OTHER'} weights", flush=True)
    results = {
        "command": " ".join(["python", *sys.argv]),
        "seconds_undisturbed": round(seconds, 1),
        "kills": len(kills),
        "killed_at_work_on": dict(Counter(kill["at_work_on"] for kill in kills).most_common()),
        "runs": len(same),
        "runs_with_the_same_weights": sum(same),
        "each_kill": kills,
    }
    write_json(arguments.results, results)
    print({name: value for name, value in results.items() if name != "each_kill"})
    sys.exit(not all(same))


def start(command: list[str], folder: Path) -> BaseProcess:
    """The command at work in `folder`, in a process of its own that has only imported things."""
    process = PROCESSES.Process(target=work, args=([*command, "--output", str(folder)],))
    process.start()
    return process


def work(command: list[str]) -> None:
    """What the process does."""
    sys.argv = command
    sys.stdout = open(os.devnull, "w")
    from flashmorph.cli import main

    main()


def finish(process: BaseProcess) -> None:
    """Wait for a process; one that fails ends all."""
    process.join()
    if process.exitcode:
        sys.exit(f"a run ended with exit code {process.exitcode}")


def run_or_kill(command: list[str], folder: Path, seconds: float, most: int, kills: list[dict]) -> bool:
    """Start the run and kill it after so many seconds, unless there were enough kills; whether it got to its end."""
    process = start(command, folder)
    process.join(seconds if len(kills) < most else None)
    if process.is_alive():
        process.kill()
        process.join()
        kills.append({"seconds": round(seconds, 2), "folder": folder.name, "at_work_on": at_work_on(folder)})
        return False
    finish(process)
    return True


def at_work_on(folder: Path) -> str:
    """The stage, or the rows of a stage, that a killed run was at work on."""
    at_work = [*folder.glob("stages/*.partial"), *folder.glob("data/*.partial")]
    if not at_work:
        return "something between stages"
    newest = max(at_work, key=lambda path: path.stat().st_mtime)
    return newest.name.split("-")[0] + (" rows" if newest.parent.name == "data" else "")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


if __name__ == "__main__":
    main()
