"""Run strategies over budgets and seeds, and let the referee judge every plan they find."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flashmorph.errors import UserError
from flashmorph.judge import recall_of_plan
from flashmorph.morphable import Morphable
from flashmorph.pipeline import open_morphable, open_objective, run_align, run_transplant
from flashmorph.plan import Budget
from flashmorph.recipe import parse_changes, unknown
from flashmorph.referee.after import after_distillation
from flashmorph.referee.cells import Cell, CellFile, cell_key
from flashmorph.referee.truth import Truth, find_truths
from flashmorph.run import Run
from flashmorph.rundata import task_settings
from flashmorph.runfolder import digest_of
from flashmorph.selection import DEFAULT_STRATEGY, SERVE_EVERY_BUDGET, STRATEGIES, Selection
from flashmorph.selection.search import check_settings, select

REFEREE_SEED = 1_000_003
FIXED = ("first", "last", "middle", "uniform")
TOLERANCE = "loss=1%"


class CompareSettings(BaseModel):
    """What is compared.

    A strategy may bring settings of its own: `race+confidence=0.8`, `budgeted-gates+steps=50+random_budget=true`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    budgets: tuple[str, ...] = ("1", "2", "3")
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    seeds: int = Field(default=5, gt=0, description="seeds of the search: its data and its noise")
    spends: tuple[float, ...] = (1.0,)
    questions: int = Field(default=256, gt=0, description="questions of the referee's split")
    recall_questions: int = Field(default=25, ge=0, description="generated answers a task and plan; 0 for none")
    distill_steps: int = Field(default=0, ge=0, description="steps of the distillation that plans are compared after")
    distill_budget: str = "2"
    distilled: tuple[str, ...] = ("uniform", "halo", DEFAULT_STRATEGY)
    max_plans: int = Field(default=2_000, gt=0, description="the most plans that are enumerated")


@dataclass(frozen=True)
class Comparison:
    """All cells, the truth about every budget by its name, and what plans can do after the same distillation."""

    cells: list[Cell]
    truths: dict[str, Truth]
    after: list[dict[str, Any]]


def compare(run: Run, settings: CompareSettings, folder: Path) -> Comparison:
    """Run every search that is not done yet and judge it. Cells are kept in `folder`; an interrupted run goes on.

    Raises:
        UserError: too many plans to enumerate, or a search that cannot run.
    """
    host = run_transplant(run)
    branches = run_align(run, host)
    morphable = open_morphable(run, host, branches)
    work = run.folder.path / "compare"
    search = run.recipe.select.search.model_dump(mode="json")
    context = digest_of([run.teacher.digest, branches.digest, task_settings(run), search, settings.questions])
    work = work / context
    truths = enumerate_plans(run, morphable, settings, work / "referee")
    cells = CellFile(folder / "cells.jsonl", context)
    wanted = list(_wanted(settings))
    with run.screen.stage("search", f"{len(wanted)} cells") as report:
        for number, (strategy, seed, spend, budgets) in enumerate(wanted):
            own = _settings(strategy, spend, run.recipe.select.search.questions)
            every_budget = _serves_every_budget(*parse_strategy(strategy))
            missing = [name for name in budgets if cell_key(strategy, name, seed, spend, own) not in cells.cells]
            found: Selection | None = None
            for name in missing:
                if found is None or not every_budget:
                    found = _search(run, morphable, strategy, name, seed, own, work)
                cell = _judge(run, morphable, found, strategy, name, seed, spend, own, truths.get(name), settings, work)
                cells.add(cell)
            report(number + 1, len(wanted))
    found_cells = [cell for cell in cells.cells.values() if _asked_for(cell, wanted)]
    after: list[dict[str, Any]] = []
    if settings.distill_steps and settings.distill_budget in truths:
        search = run.recipe.select.search.model_copy(update={"questions": settings.questions})
        budget, steps = settings.distill_budget, settings.distill_steps
        after = after_distillation(
            run, morphable, found_cells, truths[budget], budget, settings.distilled, steps, search, work
        )
    return Comparison(found_cells, truths, after)


def enumerate_plans(run: Run, morphable: Morphable, settings: CompareSettings, work: Path) -> dict[str, Truth]:
    """The truth about every budget, on the referee's split."""
    search = run.recipe.select.search.model_copy(update={"questions": settings.questions})
    with run.screen.stage("referee", "every plan") as report:
        judge = replace(run, recipe=run.recipe.model_copy(update={"seed": REFEREE_SEED}))
        objective = open_objective(judge, morphable, "", work, report, search, judging="referee")
        budgets = [Budget.parse(name) for name in settings.budgets]
        space = morphable.space(budgets[0])
        return find_truths(space, budgets, objective, settings.max_plans, lambda share: report(share, 1))


def _wanted(settings: CompareSettings) -> Iterator[tuple[str, int, float, tuple[str, ...]]]:
    """(strategy, seed, spend, budgets) of every search, the cheap ones first."""

    def order(label: str) -> tuple[bool, bool, str]:
        name, own = parse_strategy(label)
        return name not in FIXED, not _serves_every_budget(name, own), label

    for label in sorted(settings.strategies, key=order):
        name, _ = parse_strategy(label)
        seeds = 1 if name in (*FIXED, "kl", "tolerance") else settings.seeds
        spends = settings.spends if _knob(name) else (1.0,)
        budgets = (TOLERANCE,) if name == "tolerance" else settings.budgets
        yield from ((label, seed, spend, budgets) for seed in range(seeds) for spend in spends)


def parse_strategy(label: str) -> tuple[str, dict[str, Any]]:
    """`race+confidence=0.8` as a strategy and its settings.

    Raises:
        UserError: there is no such strategy or setting.
    """
    name, *changes = label.split("+")
    if name not in STRATEGIES:
        raise UserError(unknown("strategy", name, STRATEGIES))
    if any("=" not in change for change in changes):
        raise UserError(f"strategy {label!r}: settings after a plus must be key=value, for example race+confidence=0.8")
    own = parse_changes(changes)
    check_settings(name, own)
    return name, own


def _serves_every_budget(name: str, own: dict[str, Any]) -> bool:
    return name in SERVE_EVERY_BUDGET or bool(own.get("random_budget"))


def _asked_for(cell: Cell, wanted: Sequence[tuple]) -> bool:
    return any(
        (cell.strategy, cell.seed, cell.spend) == (strategy, seed, spend) and cell.budget in budgets
        for strategy, seed, spend, budgets in wanted
    )


def _knob(strategy: str) -> str | None:
    """The setting that says how much a strategy spends."""
    known = inspect.signature(STRATEGIES[strategy]).parameters
    return next((name for name in ("steps", "num_questions") if name in known), None)


def _settings(label: str, spend: float, questions: int) -> dict[str, Any]:
    """A strategy's own settings at a share of its spend."""
    name, own = parse_strategy(label)
    knob = _knob(name)
    if knob and spend != 1:
        whole = own.get(knob) or inspect.signature(STRATEGIES[name]).parameters[knob].default or questions
        own[knob] = max(1, round(spend * whole))
    return own


def _search(
    run: Run, morphable: Morphable, strategy: str, budget: str, seed: int, own: dict[str, Any], work: Path
) -> Selection:
    """One search, its evaluations shared with the others of the same seed."""
    name, _ = parse_strategy(strategy)
    folder = work / f"{name}-{digest_of([budget, seed, own])}"
    searcher = replace(run, recipe=run.recipe.model_copy(update={"seed": seed}))
    with run.screen.stage("search", f"{strategy}, budget {budget}, seed {seed}") as report:
        objective = open_objective(searcher, morphable, name, folder, report, evaluations=work / f"validation-{seed}")
        return select(morphable, budget, name, objective, seed, **own)


def _judge(
    run: Run,
    morphable: Morphable,
    found: Selection,
    strategy: str,
    name: str,
    seed: int,
    spend: float,
    own: dict[str, Any],
    truth: Truth | None,
    settings: CompareSettings,
    work: Path,
) -> Cell:
    """What the referee says of a search's plan for the budget `name`."""
    plan = found.plan
    if _serves_every_budget(*parse_strategy(strategy)):
        budget = Budget.parse(name)
        plan = morphable.space(budget).best(found.scores, budget)
    details: dict[str, Any] = {"scores": found.scores[:, 0].tolist()}
    if name == TOLERANCE:
        details["trace"] = found.trace
    recall = None
    if settings.recall_questions:
        recall = recall_of_plan(run, morphable, plan, "referee", REFEREE_SEED, settings.recall_questions, work)
    return Cell(
        strategy,
        name,
        seed,
        spend,
        own,
        plan.full_layers,
        loss=truth.loss(plan) if truth else None,
        regret=truth.regret(plan) if truth else None,
        rank=truth.rank(plan) if truth else None,
        cost=found.cost.to_dict(),
        recall=recall,
        details=details,
    )
