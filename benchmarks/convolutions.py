"""What do convolutions before a mixer gain in alignment? Dynamic taps against static ones and none, on equal tokens.

    python benchmarks/convolutions.py --teacher tiny --seeds 3 --set align.tokens=131072 \\
        --mixers linear gated_delta_net mamba2

The relative error of branches of all layers after the same alignment, without a convolution, with static taps
(`host.conv_rank=0`) and with taps made from the input (rank 15), all of width 4. Finished rows are kept in
`benchmarks/results/convolutions.json` and not computed again.

    python benchmarks/convolutions.py --mixers full --set align.tokens=2048 extend.tokens=262144 extend.length=256 \\
        extend.learning_rate=3e-4 evaluate.length=256 evaluate.questions=1

Before full attention, which is its own teacher, no error can fall. There all weights are trained on the next token of
text, and the held-out perplexity is compared. The "window" of 507 tokens beside 4 sinks is longer than any row.
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
from flashmorph.pipeline.morph import run_build, run_evaluate
from flashmorph.pipeline.training import run_extend
from flashmorph.plan import Budget
from flashmorph.records import Figures
from flashmorph.run.models import open_morphable
from flashmorph.run.run import Run

FULL = "full"
EVERY_TOKEN = {"mixers": "full,window", "window": 507, "sinks": 4}
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
        own = EVERY_TOKEN if mixer == FULL else {"mixers": f"full,{mixer}"}
        settings = {**own, **FORMS[form]}
        changes = [*(f"host.{key}={value}" for key, value in settings.items()), f"seed={seed}", *arguments.set]
        folder = Path(f"runs/convolutions-{about['teacher']}-{mixer}-{form}-{seed}")
        run = open_run(
            Options(teacher=arguments.teacher, output=folder, recipe=arguments.recipe, changes=changes),
            ["align", "extend", "evaluate"] if mixer == FULL else ["align"],
        )
        rows.append({**about, **(trained(run) if mixer == FULL else aligned(run))})
        write_json(arguments.output, {"rows": rows})
    show(rows)


def aligned(run: Run) -> Figures:
    """The error of every layer's branch."""
    record = run_align(run, run_transplant(run)).record
    return {"errors": record["errors"], "tokens": run.recipe.align.tokens}


def trained(run: Run) -> Figures:
    """Held-out perplexity after all weights of a model with nothing but "windows" were trained on text."""
    host = run_transplant(run)
    branches = run_align(run, host)
    space = open_morphable(run, host, branches).space(Budget("heads", 1))
    built = run_build(run, host, branches, space.plan([], space.count(0)))
    score = run_evaluate(run, "trained", run_extend(run, built))
    assert run.recipe.extend
    return {"perplexity": score.perplexity, "tokens": run.recipe.extend.tokens}


def show(rows: list[Figures]) -> None:
    """A line for every mixer and form."""
    table = Table(
        "teacher", "mixer", "convolution", "seeds", "mean error, or perplexity", "lowest and highest", "by layer"
    )
    kinds = [tuple(row[name] for name in ("teacher", "mixer", "form")) for row in rows]
    for kind in sorted(set(kinds)):
        alike = [row for row, own in zip(rows, kinds, strict=True) if own == kind]
        errors = np.array([row["errors"] if "errors" in row else [row["perplexity"]] for row in alike])
        means = errors.mean(1)
        by_layer = " ".join(f"{error:.2f}" for error in errors.mean(0))
        spread = f"{means.min():.3f} to {means.max():.3f}"
        table.add_row(*kind, str(len(errors)), f"{means.mean():.3f}", spread, by_layer)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
