"""Run strategies over budgets and seeds; the referee judges every plan that they choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flashmorph.errors import UserError
from flashmorph.hosts import configure, layer_space
from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.referee.cells import Cell, CellFile
from flashmorph.referee.entry import FOUND, Wanted, budget_of, wanted
from flashmorph.referee.finding import require_tokens
from flashmorph.referee.judging import Referee, prices_of
from flashmorph.referee.reference import Reference
from flashmorph.referee.settings import CompareSettings, for_a_found_reference
from flashmorph.referee.truth import require_few
from flashmorph.run.run import Run
from flashmorph.selection import Selection
from flashmorph.selection.search import check_search


@dataclass(frozen=True)
class Comparison:
    """All cells, the reference of each budget by its name, and the results after the same short distillation."""

    cells: list[Cell]
    truths: Mapping[str, Reference]
    after: list[Figures] = field(default_factory=list)


def compare(run: Run, settings: CompareSettings, folder: Path) -> Comparison:
    """Run every search that is not finished and judge its plan. Cells are kept in `folder`, so that a run can resume.

    With `only_kept` no search runs: the result has all kept cells of these budgets, of any strategy, seed and spend.

    Raises:
        UserError: an unknown strategy, too many plans to enumerate, or a search or reference that cannot run.
    """
    if settings.reference == "found":
        settings = for_a_found_reference(settings, run.screen.say)
    searches = list(wanted(settings))
    _check(run, settings, searches)
    referee = Referee(run, settings)
    file = CellFile(folder / "cells.jsonl", referee.context)
    if settings.only_kept:
        kept = [cell for cell in file.cells.values() if cell.budget in (*settings.budgets, FOUND)]
        return Comparison(kept, referee.truths, referee.after(kept))
    cells: list[Cell] = []
    with run.screen.stage("compare", f"{len(searches)} searches") as report:
        for number, (entry, seed, spend, budgets) in enumerate(searches, 1):
            own = entry.at(spend, run.recipe.select.search.questions)
            selections: dict[object, Selection] = {}
            for budget in budgets:
                cell = file.find(entry.label, budget, seed, spend, own)
                if cell is None:
                    kind = budget_of(run, budget).kind if entry.serves_every_budget else budget
                    if kind not in selections:
                        selections[kind] = referee.search(entry, budget, seed, own)
                    cell = referee.judge(entry, selections[kind], budget, seed, spend, own)
                    file.add(cell)
                elif cell.recall_questions != settings.recall_questions:
                    recall = referee.recall(Plan(cell.assignments, budget_of(run, budget)))
                    cell = replace(cell, recall=recall, recall_questions=settings.recall_questions)
                    file.add(cell)
                cells.append(cell)
            report(number, len(searches))
    return Comparison(cells, referee.truths, referee.after(cells))


def _check(run: Run, settings: CompareSettings, searches: Sequence[Wanted]) -> None:
    """Before any work, refuse searches and references that cannot run.

    Raises:
        UserError: see `check_search`, `require_few` and `require_tokens`; or plans are to be distilled of a budget that
            is not compared.
    """
    if settings.distill_steps and settings.distill_budget not in settings.budgets:
        raise UserError(
            f"plans of budget {settings.distill_budget} are to be compared after distillation, and it is none of "
            f"{', '.join(settings.budgets)}: give one of these to --distill-budget"
        )
    host, config = configure(run.teacher.config, run.recipe.host)
    search, budgets = run.recipe.select.search, [run.budget(name) for name in settings.budgets]
    if settings.reference == "enumerated":
        require_few(lambda budget: layer_space(host, config, budget), budgets, settings.max_plans)
    else:
        for budget in budgets:
            require_tokens(budget, search.questions, prices_of(search), settings.reference_tokens)
    for entry, _, spend, names in searches:
        for budget in (budget_of(run, name) for name in names):
            space = layer_space(host, config, budget)
            check_search(entry.strategy, space, budget, search.questions, entry.at(spend, search.questions))
