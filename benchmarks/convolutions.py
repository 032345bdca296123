"""What do convolutions before a mixer gain in alignment? Dynamic taps against static ones and none, on equal tokens.

    python benchmarks/convolutions.py --teacher tiny --seeds 3 --set align.tokens=131072

The relative error of `linear` branches of all layers after the same alignment, without a convolution, with static taps
(`host.conv_rank=0`) and with taps made from the input (rank 15), all of width 4. Finished rows are kept in
`benchmarks/results/convolutions.json` and not computed again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flashmorph.cli.options import Options, open_run, quiet
from flashmorph.files import write_json
from flashmorph.pipeline.branches import run_align, run_transplant

FORMS = {"none": {}, "static": {"conv": 4, "conv_rank": 0}, "dynamic": {"conv": 4, "conv_rank": 15}}


def main() -> None:
    """Align what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], help="changes of the recipe")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/convolutions.json"))
    arguments = parser.parse_args()
    quiet()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    wanted = [(form, seed) for seed in range(arguments.seeds) for form in FORMS]
    for form, seed in wanted:
        about = {"teacher": Path(arguments.teacher).name, "set": " ".join(arguments.set), "form": form, "seed": seed}
        if any(about.items() <= row.items() for row in rows):
            continue
        settings = {"mixers": "full,linear", **FORMS[form]}
        changes = [*(f"host.{key}={value}" for key, value in settings.items()), f"seed={seed}", *arguments.set]
        folder = Path(f"runs/convolutions-{about['teacher']}-{form}-{seed}")
        run = open_run(
            Options(teacher=arguments.teacher, output=folder, recipe=arguments.recipe, changes=changes), ["align"]
        )
        record = run_align(run, run_transplant(run)).record
        rows.append({**about, "errors": record["errors"], "tokens": run.recipe.align.tokens})
        write_json(arguments.output, {"rows": rows})
    table = Table("teacher", "convolution", "seeds", "mean error", "lowest and highest", "by layer")
    for teacher, form in sorted({(row["teacher"], row["form"]) for row in rows}):
        errors = np.array([row["errors"] for row in rows if (row["teacher"], row["form"]) == (teacher, form)])
        means = errors.mean(1)
        by_layer = " ".join(f"{error:.2f}" for error in errors.mean(0))
        spread = f"{means.min():.3f} to {means.max():.3f}"
        table.add_row(teacher, form, str(len(errors)), f"{means.mean():.3f}", spread, by_layer)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
