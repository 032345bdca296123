"""The figures of a real model, put together from its runs.

    python benchmarks/debian_text.py --output runs/text
    make smollm2-baseline ARGS='--data runs/text'
    python benchmarks/many_layers.py --data runs/text --window 128 --strategies budgeted-gates race
    python benchmarks/many_layers.py --show
    flashmorph evaluate MODEL.gguf runs/smollm2-window --set evaluate.length=2048 --json > runs/evaluated/2048.json
    python benchmarks/smollm2.py runs/smollm2-window runs/smollm2-linear --evaluated runs/evaluated/*.json

Writes `benchmarks/results/smollm2.json`: of each run all models, the plan, what the search took, the seconds of every
stage, and the settings in which the run differs from the recipe `laptop`; how far the default search is from the
best plan known; and what `flashmorph evaluate` printed into files, by their names. Forms and files of an earlier call
stay. Prints a table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flashmorph.files import write_json
from flashmorph.recipe.recipe import load_recipe
from flashmorph.selection import DEFAULT_STRATEGY

MODELS = ("teacher", "uniform_undistilled", "uniform", "hybrid_undistilled", "hybrid")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Read, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--evaluated", nargs="+", type=Path, default=[])
    parser.add_argument("--machine", default="", help="what these runs ran on, in words")
    parser.add_argument("--search", type=Path, default=RESULTS / "smollm2_search.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "smollm2.json")
    arguments = parser.parse_args()
    before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    machine = {"machine": arguments.machine} if arguments.machine else {}
    forms = {folder.name.removeprefix("smollm2-"): machine | figures_of(folder) for folder in arguments.runs}
    evaluated = {file.stem: evaluated_in(file) for file in arguments.evaluated}
    figures = {
        **before,
        **forms,
        "evaluated": before.get("evaluated", {}) | evaluated,
        "default_vs_best_known": cells_of(arguments.search),
    }
    write_json(arguments.output, figures)
    show(forms)


def figures_of(folder: Path) -> dict[str, Any]:
    """Results of a run, with its settings and what its search took."""
    results = json.loads((folder / "results.json").read_text())
    stages = results.pop("stages")
    search = [json.loads(file.read_text()) for file in folder.glob("stages/select-*/stage.json")]
    settings = changes(folder)
    if not search:  # Layers were given.
        settings = {name: value for name, value in settings.items() if not name.startswith("select.")}
    return {
        "settings": settings,
        **results,
        "search_tokens": search[0]["cost"] if search else None,
        "seconds": [[stage["stage"], stage["seconds"]] for stage in stages],
    }


def evaluated_in(file: Path) -> dict[str, Any]:
    """Figures by model: the teacher, the runs by their form, and the baseline of the run whose stage it is."""
    text = file.read_text()
    named = {}
    for model, figures in json.loads(text[text.index("{") :]).items():
        form = next((part for part in Path(model).parts if part.startswith("smollm2-")), "teacher")
        name = "uniform" if "stages" in Path(model).parts else form.removeprefix("smollm2-")
        named[name] = {key: value for key, value in figures.items() if key != "cache_bytes"}
    return named


def changes(folder: Path) -> dict[str, Any]:
    """The settings that are not those of the recipe `laptop`; where the text lay says nothing."""
    own, shipped = (flat(load_recipe(name).model_dump(mode="json")) for name in (folder / "recipe.yaml", "laptop"))
    return {name: value for name, value in own.items() if shipped.get(name) != value and not name.startswith("data.")}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def cells_of(file: Path) -> list[dict[str, Any]]:
    """The cells of the default search."""
    cells = json.loads(file.read_text())["cells"] if file.exists() else []
    return [cell for cell in cells if cell["strategy"] == DEFAULT_STRATEGY]


def show(forms: dict[str, Any]) -> None:
    """A line for every model of every run."""
    table = Table(title="SmolLM2-135M-Instruct, 7 of 30 layers full", title_justify="left")
    for column in ("run", "model", "recall", "95 %", "perplexity"):
        table.add_column(column, justify="left" if column in ("run", "model") else "right")
    for form, figures in forms.items():
        for name in MODELS:
            if name in figures:
                each = figures[name]
                interval = " to ".join(f"{100 * end:.1f}" for end in each["recall_interval"])
                table.add_row(form, name, f"{100 * each['recall']:.1f} %", interval, f"{each['perplexity']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
