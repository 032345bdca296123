"""Kill a demo run in align, select and distill, start it again each time, and compare with an uninterrupted run.

    python benchmarks/kill_and_resume.py --reference runs/demo --output runs/killed

The final weights must be the same to the last bit. Writes `benchmarks/results/kill_and_resume.json`.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from flashmorph.files import write_json

STAGES = {
    "align": "checkpoints/checkpoint-*/finished",
    "select": "search_state.json",
    "distill": "checkpoints/*/finished",
}


def main() -> None:
    """Run, kill, run again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", default="tiny")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "flashmorph", "morph", arguments.teacher, "--output", str(arguments.output)]
    command += ["--recipe", str(arguments.reference / "recipe.yaml")]
    killed = [kill_in(command, arguments.output, stage, pattern) for stage, pattern in STAGES.items()]
    subprocess.run(command, check=True)
    expected = load_file(arguments.reference / "model.safetensors")
    found = load_file(arguments.output / "model.safetensors")
    same = expected.keys() == found.keys() and all(bool((expected[name] == found[name]).all()) for name in expected)
    command_line = f"python benchmarks/kill_and_resume.py --reference {arguments.reference} --output {arguments.output}"
    results = {"command": command_line, "killed_in": killed, "same_weights": same}
    write_json(Path("benchmarks/results/kill_and_resume.json"), results)
    print(results)
    sys.exit(not same)


def kill_in(command: list[str], output: Path, stage: str, pattern: str) -> dict:
    """SIGKILL a run some seconds after `stage` has first kept its state."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob(f"stages/{stage}-*.partial/{pattern}")):
        time.sleep(0.2)
    time.sleep(3)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {"stage": stage, "was_running": alive}


if __name__ == "__main__":
    main()
