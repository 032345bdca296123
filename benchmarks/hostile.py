"""Give every command malformed and hostile input, and count how it ends.

    python benchmarks/hostile.py --cases 3000

Divides the cases among the generators in `tests/hostile/`: each ends in one sentence and exit code 2, or in what is
right and 0, with everything outside the output as it was. Writes `--results`, by default
`benchmarks/results/hostile.json`, with every case that did not.
"""

import argparse
import os
import pkgutil
import sys
import time
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS)]  # Before this folder, whose file has the package's name.

import hostile  # noqa: E402
from hostile.harness import run_case  # noqa: E402

from flashmorph.files import write_json  # noqa: E402

PROBLEMS = ("traceback", "hang", "harmed", "words", "wrong")


def main() -> None:
    """Make the cases, run them one after the other, and print a table by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="in all, the same number of each generator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/hostile.json"))
    arguments = parser.parse_args()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    failed: list[dict[str, str]] = []
    started, makers = time.perf_counter(), generators()
    with TemporaryDirectory() as place:
        for turn, maker in enumerate(makers):
            number = arguments.cases * (turn + 1) // len(makers) - arguments.cases * turn // len(makers)
            for each, case in enumerate(maker.generate(arguments.seed, number)):
                outcome = run_case(case, Path(place) / f"{turn}-{each}")
                kinds[case.kind].update(["cases", f"rc {outcome.code}", *outcome.problems])
                for problem, about in outcome.problems.items():
                    failed.append({"kind": case.kind, "name": case.name, "problem": problem, "about": about})
                    print(f"{case.kind}, {case.name}: {problem}: {about}", file=sys.stderr)
    columns = ["cases", "rc 2", "rc 0", *PROBLEMS]
    for row in [["", *columns], *([kind, *(str(kinds[kind][column]) for column in columns)] for kind in kinds)]:
        print(f"{row[0]:16}" + "".join(f"{cell:>10}" for cell in row[1:]))
    total = sum(kinds.values(), Counter())
    print(f"{'all':16}" + "".join(f"{total[column]:>10}" for column in columns))
    write_json(
        arguments.results,
        {
            "seed": arguments.seed,
            "seconds": round(time.perf_counter() - started, 1),
            "kinds": {kind: {column: counts[column] for column in columns} for kind, counts in kinds.items()},
            "all": {column: total[column] for column in columns},
            "failed": failed,
        },
    )


def generators() -> list[ModuleType]:
    """Every module of `tests/hostile/` that makes cases."""
    names = [name for _, name, _ in pkgutil.iter_modules(hostile.__path__) if not name.startswith("test_")]
    modules = [import_module(f"hostile.{name}") for name in sorted(names)]
    return [module for module in modules if hasattr(module, "generate")]


if __name__ == "__main__":
    main()
