"""Run strategies over budgets and seeds; the referee ranks every plan that they choose."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from flashmorph.convert.load import load_config
from flashmorph.errors import UserError, unknown
from flashmorph.estimate.auto import COMPARE
from flashmorph.files import digest_of
from flashmorph.hosts import configure, layer_space
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.pipeline.signal import with_signal
from flashmorph.plan import Budget
from flashmorph.recipe.recipe import parse_changes
from flashmorph.records import Figures, SettingValues
from flashmorph.referee.after import after_distillation
from flashmorph.referee.cells import Cell, CellFile
from flashmorph.referee.truth import Truth, find_truths
from flashmorph.run.digests import ends, task_settings, text_settings
from flashmorph.run.models import open_morphable, open_objective, run_search
from flashmorph.run.recall import recall_of_plan
from flashmorph.run.run import Run
from flashmorph.selection import BASELINE, DEFAULT_STRATEGY, STRATEGIES, Selection, Strategy
from flashmorph.selection.search import check_search, own_settings, reuse_of

REFEREE_SEED = 1_000_003
FOUND = "found"
"""The name of the budget in cells of strategies that choose their own."""


class CompareSettings(BaseModel):
    """Settings of a comparison.

    A strategy may have settings of its own: `race+confidence=0.8`, `budgeted-gates+steps=50+random_budget=true`.
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
    distilled: tuple[str, ...] = (BASELINE, DEFAULT_STRATEGY)
    max_plans: int = Field(default=2_000, gt=0, description="the most plans that are enumerated")
    only_kept: bool = Field(default=False, description="show the cells that are there and search for no other")


@dataclass(frozen=True)
class Comparison:
    """All cells, the losses of all plans by budget, and the results after the same short distillation."""

    cells: list[Cell]
    truths: dict[str, Truth]
    after: list[Figures] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One strategy with its settings; `label` is its form on the command line."""

    label: str
    strategy: str
    settings: SettingValues

    @classmethod
    def parse(cls, label: str) -> "Entry":
        """Read `race+confidence=0.8`.

        Raises:
            UserError: there is no such strategy or setting, or its value is wrong.
        """
        name, *changes = label.split("+")
        if name not in STRATEGIES:
            raise UserError(unknown("strategy", name, STRATEGIES))
        if any("=" not in change for change in changes):
            raise UserError(f"strategy {label!r}: give settings after a plus as key=value, such as race+confidence=0.8")
        settings = parse_changes(changes)
        own_settings(name, settings)
        return cls(label, name, settings)

    @property
    def record(self) -> Strategy:
        """The entry of the strategy in `STRATEGIES`."""
        return STRATEGIES[self.strategy]

    @property
    def serves_every_budget(self) -> bool:
        """Whether the scores of one search give the plan of every budget."""
        return reuse_of(self.strategy, self.settings) == "scores"

    @property
    def knob(self) -> str | None:
        """The setting that scales the cost of the strategy."""
        return next((name for name in ("steps", "num_questions") if name in own_settings(self.strategy)), None)

    def at(self, spend: float, questions: int) -> Figures:
        """All settings, with defaults, at the share `spend` of the full cost; there are `questions` questions."""
        settings = own_settings(self.strategy, self.settings)
        if self.knob and spend != 1:
            settings[self.knob] = max(1, round(spend * (settings[self.knob] or questions)))
        return settings


class Referee:
    """Evaluates every plan of one aligned teacher, runs searches on it, and ranks their plans."""

    def __init__(self, run: Run, settings: CompareSettings):
        """Transplant and align unless that is done, then evaluate every plan of every budget.

        Raises:
            UserError: too many plans to enumerate; or see `with_signal`.
        """
        host = run_transplant(run)
        branches = run_align(run, host)
        run = with_signal(run, host, branches)
        self._run, self._settings = run, settings
        self._morphable = open_morphable(run, host, branches)
        search = run.recipe.select.search.model_dump(mode="json", exclude={"micro_batch_tokens"})
        trained = run.recipe.distill.what_counts(tokens=False)
        about = [task_settings(run), text_settings(run), ends(run), search, trained, settings.questions]
        self.context = digest_of([branches.digest, run.bf16, *about])
        self._work = run.folder.path / "compare" / self.context
        self._run = run = replace(run, recipe=run.at_once(COMPARE, self._work))
        self._search = run.recipe.select.search.model_copy(update={"questions": settings.questions})
        self.truths = self._enumerate()

    def search(self, entry: Entry, budget: str, seed: int, settings: SettingValues) -> Selection:
        """Run one search; searches of the same seed share their evaluations."""
        alike = reuse_of(entry.strategy, settings) in ("state", "scores")
        about = [seed, settings] if alike else [budget, seed, settings]
        folder = self._work / f"{entry.strategy}-{digest_of(about)}"
        recipe = self._run.recipe
        chosen = recipe.select.model_copy(update={"strategy": entry.strategy, "settings": settings})
        run = replace(self._run, recipe=recipe.model_copy(update={"seed": seed, "select": chosen}))
        evaluations = self._work / f"validation-{seed}"
        with run.screen.stage("search", f"{entry.label}, budget {budget}, seed {seed}") as report:
            return run_search(run, self._morphable, _budget(budget), folder, report, evaluations)

    def judge(
        self, entry: Entry, found: Selection, budget: str, seed: int, spend: float, settings: SettingValues
    ) -> Cell:
        """The result of a search for one budget.

        Args:
            entry: The strategy.
            found: What it chose.
            budget: By its name.
            seed: Of the search.
            spend: The share of the full cost that the search had.
            settings: All settings of the strategy.

        Returns:
            The plan with its loss in nats, regret and rank among all plans, the cost of the search and, where asked
            for, recall.
        """
        plan, truth = found.plan, self.truths.get(budget)
        if entry.serves_every_budget:
            parsed = Budget.parse(budget)
            plan = self._morphable.space(parsed).best(found.scores, parsed)
        details: Figures = {"scores": self._morphable.space(plan.budget).worth(found.scores).tolist()}
        if budget == FOUND:
            details["trace"] = found.trace
        recall, questions = None, self._settings.recall_questions
        if questions:
            recall = recall_of_plan(
                self._run, self._morphable, plan, "referee", REFEREE_SEED, questions, self._work / "recall"
            )
        return Cell(
            strategy=entry.label,
            budget=budget,
            seed=seed,
            spend=spend,
            settings=settings,
            assignments=plan.assignments,
            loss=truth.loss(plan) if truth else None,
            regret=truth.regret(plan) if truth else None,
            rank=truth.rank(plan) if truth else None,
            cost=found.cost.to_dict(),
            recall=recall,
            details=details,
        )

    def after(self, cells: list[Cell]) -> list[Figures]:
        """The results after the same short distillation; empty unless the settings ask for it."""
        settings = self._settings
        truth = self.truths.get(settings.distill_budget)
        if not settings.distill_steps or not truth:
            return []
        cells = [cell for cell in cells if cell.strategy in settings.distilled]
        return after_distillation(
            self._run, self._morphable, cells, truth, settings.distill_steps, self._search, self._work / "after"
        )

    def _enumerate(self) -> dict[str, Truth]:
        """The losses of all plans of every budget, on the referee's split."""
        with self._run.screen.stage("referee", "every plan") as report:
            run = replace(self._run, recipe=self._run.recipe.model_copy(update={"seed": REFEREE_SEED}))
            work = self._work / "referee"
            objective = open_objective(run, self._morphable, work, self._search, judging="referee")
            budgets, most = [Budget.parse(name) for name in self._settings.budgets], self._settings.max_plans
            space_of = self._morphable.space
            return find_truths(space_of, budgets, objective, most, lambda share: report(round(100 * share), 100))


def compare(run: Run, settings: CompareSettings, folder: Path) -> Comparison:
    """Run every search that is not finished and rank its plan. Cells are kept in `folder`, so that a run can resume.

    With `only_kept` no search runs: the result has all kept cells of these budgets, of any strategy, seed and spend.

    Raises:
        UserError: an unknown strategy, too many plans to enumerate, or a search that cannot run.
    """
    searches = list(_wanted(settings))
    _check(run, searches)
    referee = Referee(run, settings)
    file = CellFile(folder / "cells.jsonl", referee.context)
    if settings.only_kept:
        kept = [cell for cell in file.cells.values() if cell.budget in (*settings.budgets, FOUND)]
        return Comparison(kept, referee.truths, referee.after(kept))
    cells: list[Cell] = []
    with run.screen.stage("compare", f"{len(searches)} searches") as report:
        for number, (entry, seed, spend, budgets) in enumerate(searches, 1):
            own = entry.at(spend, run.recipe.select.search.questions)
            selection: Selection | None = None
            for budget in budgets:
                cell = file.find(entry.label, budget, seed, spend, own)
                if cell is None:
                    if selection is None or not entry.serves_every_budget:
                        selection = referee.search(entry, budget, seed, own)
                    cell = referee.judge(entry, selection, budget, seed, spend, own)
                    file.add(cell)
                cells.append(cell)
            report(number, len(searches))
    return Comparison(cells, referee.truths, referee.after(cells))


def _budget(name: str) -> Budget:
    """A budget by its name; one layer for strategies that choose their own."""
    return Budget("layers", 1) if name == FOUND else Budget.parse(name)


def _check(run: Run, wanted: Sequence[tuple[Entry, int, float, tuple[str, ...]]]) -> None:
    """Before the first search, refuse searches that cannot run.

    Raises:
        UserError: see `check_search`.
    """
    host, config = configure(load_config(run.teacher.folder), run.recipe.host)
    questions = run.recipe.select.search.questions
    for entry, _, spend, budgets in wanted:
        for budget in map(_budget, budgets):
            space = layer_space(host, config, budget)
            check_search(entry.strategy, space, budget, questions, entry.at(spend, questions))


def _wanted(settings: CompareSettings) -> Iterator[tuple[Entry, int, float, tuple[str, ...]]]:
    """(strategy, seed, spend, budgets) of every search, the cheap ones first."""
    entries = [Entry.parse(label) for label in settings.strategies]
    for entry in sorted(entries, key=lambda entry: (entry.record.searches, not entry.serves_every_budget)):
        seeds = settings.seeds if entry.record.seeded else 1
        spends = settings.spends if entry.knob else (1.0,)
        budgets = (FOUND,) if entry.record.finds_budget else settings.budgets
        yield from ((entry, seed, spend, budgets) for seed in range(seeds) for spend in spends)
