"""Is the choice stable, and is it a local optimum? Run on a finished demo.

    python benchmarks/stability.py runs/demo --teacher tiny --seeds 5

Selects with several seeds, compares the plan with all its one-swap neighbours (paired 95 % intervals on search-
validation questions of a seed that no search has used), and measures the recall of every uniform offset before
distillation. Prints a table and writes `benchmarks/results/stability.json`.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flashmorph.cli.options import quiet
from flashmorph.cli.screen import RichScreen
from flashmorph.convert.teacher import open_teacher
from flashmorph.devices import pick_device
from flashmorph.evaluation import answers_right, paired_interval, share_interval
from flashmorph.files import write_json
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.pipeline.morph import run_select
from flashmorph.plan import Budget, Plan, Space
from flashmorph.recipe.questions import open_questions
from flashmorph.recipe.recipe import Recipe, load_recipe
from flashmorph.run.folder import RunFolder
from flashmorph.run.models import open_morphable, open_objective
from flashmorph.run.run import Run
from flashmorph.selection import Search
from flashmorph.selection.strategies.uniform import uniform

CHECK_SEED = 1000


def main() -> None:
    """Select, compare, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/stability.json"))
    arguments = parser.parse_args()
    console = Console()
    quiet()
    recipe = load_recipe(arguments.run / "recipe.yaml")
    run = Run(open_teacher(arguments.teacher), recipe, RunFolder(arguments.run), pick_device(), RichScreen(console))
    host = run_transplant(run)
    branches = run_align(run, host)
    plans = [select_with(run, host, branches, seed) for seed in range(arguments.seeds)]
    chosen, times = Counter(plan.strip() for plan in plans).most_common(1)[0]
    plan = next(plan for plan in plans if plan.strip() == chosen)
    swaps = compare_with_swaps(run, host, branches, plan, arguments.questions)
    offsets = recall_of_offsets(run, host, branches, plan)
    results = {
        "command": f"python benchmarks/stability.py {arguments.run} --seeds {arguments.seeds}",
        "teacher": run.teacher.digest,
        "branches": branches.digest,
        "plans": [plan.strip() for plan in plans],
        "same_plan": times,
        "swaps": swaps,
        "better_swaps": sum(swap["interval"][1] < 0 for swap in swaps),
        "recall_before_distillation": offsets,
    }
    write_json(arguments.output, results)
    show(console, results)


def select_with(run: Run, host, branches, seed: int) -> Plan:
    """The plan of the recipe's strategy with another seed, its search kept in the run's folder."""
    values = {**json.loads(run.recipe.model_dump_json()), "seed": seed}
    other = Run(run.teacher, Recipe.model_validate(values), run.folder, run.device, run.screen)
    return run_select(other, host, branches)


def compare_with_swaps(run: Run, host, branches, plan: Plan, questions: int) -> list[dict]:
    """Loss of each one-swap neighbour minus the plan's, with paired intervals; below 0 the neighbour is better."""
    morphable = open_morphable(run, host, branches)
    search = run.recipe.select.search.model_copy(update={"questions": questions})
    values = {**json.loads(run.recipe.model_dump_json()), "seed": CHECK_SEED}
    check = Run(run.teacher, Recipe.model_validate(values), run.folder, run.device, run.screen)
    with tempfile.TemporaryDirectory() as folder:
        objective = open_objective(check, morphable, Path(folder), search)
        neighbours = one_swap_neighbours(plan)
        own, *others = objective.evaluate([plan, *neighbours])
    swaps = []
    for neighbour, losses in zip(neighbours, others, strict=True):
        interval = paired_interval([losses], [own])
        swaps.append({"plan": neighbour.strip(), "difference": float(np.mean(losses - own)), "interval": interval})
    return sorted(swaps, key=lambda swap: swap["difference"])


def one_swap_neighbours(plan: Plan) -> list[Plan]:
    """All plans that differ in one full layer."""
    space = Space.of_layers(len(plan.assignments))
    kept = plan.full_groups
    return [
        space.plan([group for group in kept if group != out] + [into], plan.budget)
        for out in kept
        for into in space.groups
        if into not in kept
    ]


def recall_of_offsets(run: Run, host, branches, plan: Plan) -> list[dict]:
    """Recall before distillation of the plan and of the uniform layout at each of its offsets."""
    morphable = open_morphable(run, host, branches)
    budget = Budget("layers", len(plan.full_groups))
    space = morphable.space(budget)
    layouts = {"selected": plan}
    for offset in range(len(space.groups) // len(plan.full_groups)):
        layouts[f"uniform, offset {offset}"] = uniform(Search(space, budget), offset).plan
    questions = open_questions(run.recipe, run.corpus, run.tokenizer)
    rows = []
    for name, layout in layouts.items():
        model = morphable.instantiate(layout)
        hits = [hit for examples in questions.values() for hit in answers_right(model, run.tokenizer, examples)]
        rows.append(
            {"name": name, "plan": layout.strip(), "recall": float(np.mean(hits)), "interval": share_interval(hits)}
        )
    return rows


def show(console: Console, results: dict) -> None:
    """Three short tables."""
    console.print(f"plans: {', '.join(results['plans'])}; the same on {results['same_plan']}")
    table = Table(title="one-swap neighbours: loss minus the plan's, nats")
    for column in ("plan", "difference", "95 % interval"):
        table.add_column(column)
    for swap in results["swaps"]:
        low, high = swap["interval"]
        table.add_row(swap["plan"], f"{swap['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}")
    console.print(table)
    table = Table(title="recall before distillation")
    for column in ("layout", "plan", "recall"):
        table.add_column(column)
    for row in results["recall_before_distillation"]:
        table.add_row(row["name"], row["plan"], f"{100 * row['recall']:.1f} %")
    console.print(table)


if __name__ == "__main__":
    main()
