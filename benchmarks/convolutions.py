"""What do convolutions before a mixer gain in alignment? Dynamic taps against static ones and none, on equal tokens.

    python benchmarks/convolutions.py --teacher tiny --seeds 3 --set align.tokens=131072 \\
        --mixers linear gated_delta_net mamba2

The relative error of branches of all layers after the same alignment, without a convolution, with static taps
(`host.conv_rank=0`) and with taps made from the input (rank 15), all of width 4. Finished rows are kept in
`benchmarks/results/convolutions.json` and not computed again.
"""

import argparse
import itertools
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
    parser.add_argument("--mixers", nargs="+", default=["linear"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], help="changes of the recipe")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/convolutions.json"))
    arguments = parser.parse_args()
    quiet()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for mixer, seed, form in itertools.product(arguments.mixers, range(arguments.seeds), FORMS):
        about = {"teacher": Path(arguments.teacher).name, "mixer": mixer, "form": form, "seed": seed}
        about |= {"set": " ".join(arguments.set)}
        if any(about.items() <= row.items() for row in rows):
            continue
        settings = {"mixers": f"full,{mixer}", **FORMS[form]}
        changes = [*(f"host.{key}={value}" for key, value in settings.items()), f"seed={seed}", *arguments.set]
        folder = Path(f"runs/convolutions-{about['teacher']}-{mixer}-{form}-{seed}")
        run = open_run(
            Options(teacher=arguments.teacher, output=folder, recipe=arguments.recipe, changes=changes), ["align"]
        )
        record = run_align(run, run_transplant(run)).record
        rows.append({**about, "errors": record["errors"], "tokens": run.recipe.align.tokens})
        write_json(arguments.output, {"rows": rows})
    table = Table("teacher", "mixer", "convolution", "seeds", "mean error", "lowest and highest", "by layer")
    kinds = [tuple(row[name] for name in ("teacher", "mixer", "form")) for row in rows]
    for kind in sorted(set(kinds)):
        errors = np.array([row["errors"] for row, own in zip(rows, kinds, strict=True) if own == kind])
        means = errors.mean(1)
        by_layer = " ".join(f"{error:.2f}" for error in errors.mean(0))
        spread = f"{means.min():.3f} to {means.max():.3f}"
        table.add_row(*kind, str(len(errors)), f"{means.mean():.3f}", spread, by_layer)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
