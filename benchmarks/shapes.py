"""Shapes of a switched layer: what leaner ones cost in recall and perplexity, after the same training.

    python benchmarks/shapes.py --teachers tiny natural llama --seeds 3

Each shape of each teacher goes through alignment and distillation of the recipe `demo` with the same layers full (2 and
5; no search, no extension), once a seed. Then teacher and hybrids answer the same 200 questions a task; every hybrid is
compared with the widest shape, question by question. Parameters, cache and error after alignment stand beside it.
Runs are kept under --runs, and what --output holds of the same shapes and seed is not measured again. Prints a table
and
writes `benchmarks/results/shapes.json`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from flashmorph.cli.options import quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.convert.digests import weights_digest
from flashmorph.devices import pick_device
from flashmorph.files import write_json
from flashmorph.pipeline.evaluate_models import Wanted, compare_models
from flashmorph.recipe.recipe import load_recipe

LAYERS = "2,5"
GATED_DELTA_NET = (
    {"key_heads": 4, "value_heads": 4},
    {"key_heads": 2, "value_heads": 4},
    {"key_heads": 4, "value_heads": 4, "key_dim": 16, "value_dim": 16},
    {"key_heads": 2},
)
MAMBA2 = (
    {"mamba_expand": 2, "mamba_groups": 4},
    {"mamba_expand": 2, "mamba_groups": 2},
    {"mamba_expand": 1, "mamba_groups": 4},
    {"mamba_expand": 1, "mamba_groups": 2},
)
TEACHERS = {
    "tiny": ("tiny", GATED_DELTA_NET),
    "natural": ("teachers/natural", GATED_DELTA_NET),
    "llama": ("teachers/llama", MAMBA2),
}
"""Shapes by teacher, from the widest on."""


def main() -> None:
    """Train, ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--questions", type=int, default=200, help="questions a task")
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/shapes.json"))
    arguments = parser.parse_args()
    quiet()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for seed in range(arguments.seeds):
        for name in arguments.teachers:
            teacher, shapes = TEACHERS[name]
            measured = [row for row in rows if (row["teacher"], row["seed"]) == (name, seed)]
            if {row["shape"] for row in measured} == set(map(label, shapes)):
                continue
            rows = [row for row in rows if row not in measured]
            runs = [converted(teacher, shape, seed, arguments.runs) for shape in shapes]
            rows += compared(name, teacher, shapes, runs, seed, arguments.questions)
            write_json(
                arguments.output,
                {"command": f"python benchmarks/shapes.py {shlex.join(sys.argv[1:])}".strip(), "rows": rows},
            )
    show(rows)


def label(shape: dict[str, int]) -> str:
    """The shape as it is set."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def converted(teacher: str, shape: dict[str, int], seed: int, runs: Path) -> Path:
    """The finished run of one shape."""
    folder = runs / f"{Path(teacher).name}-{'-'.join(map(str, shape.values()))}-{seed}"
    if (folder / "config.json").exists():
        return folder
    changes = {f"host.{name}": value for name, value in shape.items()}
    changes |= {"seed": seed, "extend": "null", "baseline": "null", "evaluate.questions": 8}
    command = [sys.executable, "-m", "flashmorph", "morph", teacher, "--recipe", "demo", "--layers", LAYERS]
    for setting, value in changes.items():
        command += ["--set", f"{setting}={value}"]
    subprocess.run([*command, "--output", str(folder)], check=True)
    return folder


def compared(
    name: str, teacher: str, shapes: tuple[dict[str, int], ...], runs: list[Path], seed: int, questions: int
) -> list[dict[str, Any]]:
    """A row for each shape, with its paired difference to the widest."""
    recipe = load_recipe(runs[0] / "recipe.yaml", {"evaluate.questions": questions})
    models = [*map(str, runs), teacher]
    figures = compare_models(models, Wanted(recipe), pick_device(), RichScreen(Console()))
    rows = []
    for shape, run in zip(shapes, runs, strict=True):
        record = json.loads(next(run.glob("stages/align-*/stage.json")).read_text())
        rows.append(
            {
                "teacher": name,
                "shape": label(shape),
                "seed": seed,
                "weights": weights_digest(run),
                "parameters": parameters(run),
                "errors": record["errors"],
                "of_teacher": figures[teacher],
                **figures[str(run)],
            }
        )
    return rows


def parameters(folder: Path) -> int:
    """Numbers in the checkpoint."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():
                count = 1
                for side in weights.get_slice(key).get_shape():
                    count *= side
                total += count
    return total


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each teacher, shape and seed."""
    table = Table(title="shapes of a switched layer, 2 of 8 full", title_justify="left")
    for column in ("teacher", "shape", "seed", "parameters", "error", "recall", "minus widest", "perplexity"):
        table.add_column(column, justify="left" if column in ("teacher", "shape") else "right")
    for row in rows:
        change = row.get("minus_first", {}).get("recall")
        error = sum(row["errors"]) / len(row["errors"])
        table.add_row(
            row["teacher"],
            row["shape"],
            str(row["seed"]),
            f"{row['parameters']:,}",
            f"{error:.3f}",
            f"{100 * row['recall']:.1f} %",
            str(change),
            f"{row['perplexity']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
