"""Which strategy chooses best? All of them on the referee's teachers, judged by every plan's loss.

    python benchmarks/referee.py --teachers tiny natural --seeds 5

Each teacher's run is `runs/referee-<teacher>`; cells are written to `benchmarks/results/referee-<version>/<teacher>/`
as they finish, and the same command goes on from them. At the end a table over all teachers is printed and written to
`summary.json` beside them. With `--reference found` plans are judged by the best known one; give a `--suffix` then,
since cells of one reference replace those of the other. `benchmarks/results/referee/` holds the cells of version 0.1,
which stay as they are.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from clustered import clustered_interval
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import flashmorph
from flashmorph.cli.options import quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.convert.teacher import open_teacher
from flashmorph.devices import pick_device
from flashmorph.files import write_json
from flashmorph.recipe.outlook import check
from flashmorph.recipe.recipe import load_recipe, parse_changes
from flashmorph.referee import CompareSettings, compare
from flashmorph.referee.figures import draw_regret
from flashmorph.referee.summary import summarise
from flashmorph.run.folder import RunFolder
from flashmorph.run.run import Run
from flashmorph.selection import DEFAULT_STRATEGY, STRATEGIES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / f"referee-{'.'.join(flashmorph.__version__.split('.')[:2])}"
TEACHERS = HERE.parent / "teachers"
CASES = {
    "tiny": ("tiny", "tiny"),
    "natural": (str(TEACHERS / "natural"), "keys"),
    "redundant": (str(TEACHERS / "redundant"), "keys"),
    "chains": ("tiny", "chains"),
    "many_chains": ("tiny", "many_chains"),
    "twins": (str(TEACHERS / "twins"), "keys"),
    "twin_chains": (str(TEACHERS / "twin_chains"), "chains"),
    "deep": (str(TEACHERS / "deep"), "keys"),
    "llama": (str(TEACHERS / "llama"), "keys"),
}
"""Teacher and recipe of each case. `chains` and `many_chains` ask `tiny` two hops alone; `llama` becomes Mamba2."""


def main() -> None:
    """Compare on each teacher, then over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="*", default=list(CASES), help="none: only the table over all")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--budgets", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", nargs="+", default=[], help="changes of the recipe, such as seed=1 (of the alignment)")
    parser.add_argument("--suffix", default="", help="added to the names of run and results; give one with --set")
    parser.add_argument("--distill-steps", type=int, default=0)
    parser.add_argument("--reference", choices=["enumerated", "found"], default="enumerated")
    parser.add_argument("--spends", nargs="+", type=float, default=[1.0])
    parser.add_argument("--kept", action="store_true", help="summarise every finished cell, search for no other")
    arguments = parser.parse_args()
    quiet()
    if unknown := set(arguments.teachers) - set(CASES):
        parser.error(f"--teachers {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    console = Console()
    for teacher in arguments.teachers:
        console.rule(teacher)
        compare_on(teacher, arguments, console)
    summary = over_teachers()
    write_json(RESULTS / "summary.json", summary)
    console.print(table_of(summary))


def compare_on(teacher: str, arguments: argparse.Namespace, console: Console) -> None:
    """All cells of one teacher, its summary and its picture."""
    name, about = CASES[teacher]
    recipe = load_recipe(HERE / "referee" / f"{about}.yaml", parse_changes(arguments.set))
    opened, case = open_teacher(name), teacher + arguments.suffix
    check(opened, recipe)
    run = Run(opened, recipe, RunFolder(Path("runs") / f"referee-{case}"), pick_device(), RichScreen(console))
    settings = CompareSettings(
        budgets=tuple(arguments.budgets),
        strategies=tuple(arguments.strategies),
        seeds=arguments.seeds,
        spends=tuple(arguments.spends),
        distill_steps=arguments.distill_steps,
        reference=arguments.reference,
        only_kept=arguments.kept,
    )
    summary = summarise(compare(run, settings, RESULTS / case))
    path = RESULTS / case / "compare.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    context = json.loads((RESULTS / case / "cells.jsonl").read_text().partition("\n")[0])["context"]
    if not arguments.distill_steps and known.get("context") == context:
        summary["after_distillation"] = known["after_distillation"]
    made = {"context": context, "commands": commands(known.get("commands", []), teacher, arguments)}
    write_json(path, {**made, **summary})
    draw_regret(summary, RESULTS / case / "regret.png")


def commands(known: list[str], teacher: str, arguments: argparse.Namespace) -> list[str]:
    """The commands that made the cells of a case, this one the last; one that only shows them is none."""
    command = f"python benchmarks/referee.py --teachers {teacher} --seeds {arguments.seeds}"
    if arguments.strategies != list(STRATEGIES):
        command += f" --strategies {' '.join(arguments.strategies)}"
    if arguments.spends != [1.0]:
        command += f" --spends {' '.join(map(str, arguments.spends))}"
    if arguments.set:
        command += f" --set {' '.join(arguments.set)} --suffix={arguments.suffix}"
    if arguments.reference != "enumerated":
        command += f" --reference {arguments.reference}"
    if arguments.distill_steps:
        command += f" --distill-steps {arguments.distill_steps}"
    return known if arguments.kept else [*(each for each in known if each != command), command]


def over_teachers() -> list[dict]:
    """One row a strategy: its mean regret over all teachers, budgets and seeds, and by how much it exceeds the
    default's, paired by cell; for its 95 % interval cases are drawn anew, then seeds at each budget. Regret against a
    best known plan is another quantity: those cells, which have no rank, are left out."""
    regrets: dict[str, dict[tuple, float]] = {}
    ranks: dict[str, list[int]] = {}
    for path in sorted(RESULTS / case / "compare.json" for case in CASES):
        if not path.exists():
            continue
        for cell in json.loads(path.read_text())["cells"]:
            if cell["spend"] == 1 and cell["regret"] is not None and cell["rank"] is not None:
                key = (path.parent.name, cell["budget"], cell["seed"])
                regrets.setdefault(cell["strategy"], {})[key] = cell["regret"]
                ranks.setdefault(cell["strategy"], []).append(cell["rank"])
    rows = []
    base = regrets.get(DEFAULT_STRATEGY, {})
    for strategy, found in regrets.items():
        # A strategy without a seed has one cell a budget, which stands for every seed of the default's.
        by_case: dict[str, dict[str, list[float]]] = {}
        for (case, budget, seed), default in base.items():
            own = found.get((case, budget, seed), found.get((case, budget, 0)))
            if own is not None:
                by_case.setdefault(case, {}).setdefault(budget, []).append(own - default)
        clusters = [list(budgets.values()) for budgets in by_case.values()]
        differences = [each for budgets in clusters for some in budgets for each in some]
        rows.append(
            {
                "strategy": strategy,
                "cells": len(found),
                "regret": float(np.mean(list(found.values()))),
                "first": float(np.mean([rank == 1 for rank in ranks[strategy]])),
                "worst_rank": max(ranks[strategy]),
                "minus_default": float(np.mean(differences)) if differences else None,
                "interval": clustered_interval(clusters) if len(clusters) > 1 else None,
            }
        )
    return sorted(rows, key=lambda row: row["regret"])


def table_of(rows: list[dict]) -> Table:
    """The rows on a screen."""
    title = f"over all teachers, budgets, seeds; the default is {DEFAULT_STRATEGY}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("strategy", "cells", "regret", "first", "worst", "- default", "95 %"):
        named = column == "strategy"
        table.add_column(column, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for row in rows:
        interval = row["interval"] and f"{row['interval'][0]:+.3f} to {row['interval'][1]:+.3f}"
        minus = "" if row["minus_default"] is None else f"{row['minus_default']:+.3f}"
        first = f"{row['first']:.0%}"
        table.add_row(
            row["strategy"], str(row["cells"]), f"{row['regret']:.3f}", first, str(row["worst_rank"]), minus, interval
        )
    return table


if __name__ == "__main__":
    main()
