"""What does the recall grid say when one full layer of a hybrid is silenced? Each in turn, on a finished demo.

    python benchmarks/zeroed_layer.py runs/demo

A full layer's out-projection is set to zero, which leaves everything else of the model as it is; then teacher, hybrid
and silenced hybrids answer the same grid. Prints a table and writes `benchmarks/results/zeroed_layer.json`.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from flashmorph.cli.options import quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.convert.digests import weights_digest
from flashmorph.devices import pick_device
from flashmorph.evaluation import GridSettings
from flashmorph.files import write_json
from flashmorph.pipeline.evaluate_models import Wanted, compare_models
from flashmorph.plan import Plan
from flashmorph.recipe.recipe import load_recipe


def main() -> None:
    """Silence, ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/zeroed_layer.json"))
    arguments = parser.parse_args()
    quiet()
    console = Console()
    recipe = load_recipe(arguments.run / "recipe.yaml")
    grid = GridSettings(lengths=tuple(arguments.lengths), questions=arguments.questions, style=recipe.style)
    with tempfile.TemporaryDirectory() as folder:
        silenced = {
            str(silence(arguments.run, layer, Path(folder) / f"layer-{layer}")): layer
            for layer in Plan.load(arguments.run / "plan.json").full_layers
        }
        names = [str(arguments.run), *silenced, arguments.teacher]
        figures = compare_models(names, Wanted(recipe, grid), pick_device(), RichScreen(console))
    rows = []
    for name in names:
        found, change = figures[name]["grid"], figures[name].get("minus_first", {}).get("grid")
        label = f"hybrid without layer {silenced[name]}" if name in silenced else name
        rows.append({"model": label, "recall": found["recall"], "worst": found["worst"], "minus_hybrid": change})
    command = f"python benchmarks/zeroed_layer.py {shlex.join(sys.argv[1:])}"
    about = {"command": command, "weights": weights_digest(arguments.run), "grid": grid.model_dump(mode="json")}
    write_json(arguments.output, {**about, "rows": rows})
    table = Table(title="recall grid, mean of all cells", title_justify="left")
    for column in ("model", "recall", "- hybrid", "95 %", "worst cell"):
        table.add_column(column, justify="left" if column in ("model", "worst cell") else "right")
    for row in rows:
        change, worst = row["minus_hybrid"], row["worst"][0] if row["worst"] else None
        points = (f"{100 * change['difference']:+.1f}", "{:+.1f} to {:+.1f}".format(*(100 * end for end in
                  change["interval"]))) if change else ("", "")  # fmt: skip
        cell = f"{worst['task']} at {worst['length']}: {100 * worst['recall']:.0f} %" if worst else ""
        table.add_row(row["model"], f"{100 * row['recall']:.1f} %", *points, cell)
    console.print(table)


def silence(run: Path, layer: int, folder: Path) -> Path:
    """A copy of the hybrid in `run` whose attention of one layer gives zeros."""
    folder.mkdir(parents=True)
    for path in run.iterdir():
        if path.is_file() and path.suffix == ".json":
            shutil.copy(path, folder)
    weights = load_file(run / "model.safetensors")
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


if __name__ == "__main__":
    main()
