"""The referee: runs searches on one aligned teacher, and judges their plans against the reference of each budget."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flashmorph.files import digest_of
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.pipeline.signal import with_signal
from flashmorph.plan import Budget, Plan
from flashmorph.recipe.preflight import COMPARE
from flashmorph.records import Figures, SettingValues
from flashmorph.referee.after import after_distillation
from flashmorph.referee.best_known import BestKnown, found_once
from flashmorph.referee.capped import Prices
from flashmorph.referee.cells import Cell
from flashmorph.referee.entry import FOUND, Entry, budget_of
from flashmorph.referee.finding import Found, find_best_known
from flashmorph.referee.reference import Reference
from flashmorph.referee.settings import CompareSettings
from flashmorph.referee.truth import find_truths
from flashmorph.run.digests import ends, task_settings, text_settings
from flashmorph.run.models import open_morphable, open_objective, run_search
from flashmorph.run.recall import PlanRecall, dtype_of_recall
from flashmorph.run.run import Run
from flashmorph.selection import Selection
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.search import reuse_of
from flashmorph.selection.searchdata import USUAL_TEXT, SearchSettings
from flashmorph.selection.state import StateOnDisk

REFEREE_SEED = 1_000_003
REFERENCE_SEED = 1_000_033
"""Of the questions by which a best known plan is found: those of no search under comparison."""


class Referee:
    """Finds the reference of every budget for one aligned teacher, runs searches on it, and judges their plans."""

    def __init__(self, run: Run, settings: CompareSettings):
        """Transplant and align unless that is done; then evaluate every plan of every budget, or find the best known.

        Raises:
            UserError: too many plans to enumerate; or see `with_signal`.
        """
        host = run_transplant(run)
        branches = run_align(run, host)
        run = with_signal(run, host, branches)
        self._run, self._settings = run, settings
        self._morphable = open_morphable(run, host, branches)
        search = run.recipe.select.search.model_dump(mode="json", exclude={"micro_batch_tokens"})
        if search["text_tokens"] == USUAL_TEXT:
            del search["text_tokens"]
        trained = run.recipe.distill.what_counts(tokens=False)
        about = [task_settings(run), text_settings(run), ends(run), search, trained, settings.questions]
        if settings.reference == "found":
            about += ["found", settings.reference_tokens]
        if settings.recall_questions and (dtype := dtype_of_recall(run)) != torch.float32:
            about.append(str(dtype))
        costs = {budget.costs.digest for budget in map(run.budget, settings.budgets) if budget.costs}
        about += sorted(costs)
        self.context = digest_of([branches.digest, run.bf16, *about])
        self._work = run.folder.path / "compare" / self.context
        self._run = run = replace(run, recipe=run.at_once(COMPARE, self._work))
        questions, folder = settings.recall_questions, self._work / "recall"
        self._recalls = PlanRecall(run, self._morphable, "referee", REFEREE_SEED, questions, folder)
        self._search = run.recipe.select.search.model_copy(update={"questions": settings.questions})
        self.truths: Mapping[str, Reference] = self._enumerate() if settings.reference == "enumerated" else self._find()

    def search(self, entry: Entry, budget: str, seed: int, settings: SettingValues) -> Selection:
        """Run one search; searches of the same seed share their evaluations."""
        alike, parsed = reuse_of(entry.strategy, settings) in ("state", "scores"), budget_of(self._run, budget)
        about = [seed, settings] if alike else [budget, seed, settings]
        if parsed.is_amount:
            about.append(parsed.kind)
        folder = self._work / f"{entry.strategy}-{digest_of(about)}"
        recipe = self._run.recipe
        chosen = recipe.select.model_copy(update={"strategy": entry.strategy, "settings": settings})
        run = replace(self._run, recipe=recipe.model_copy(update={"seed": seed, "select": chosen}))
        evaluations = self._work / f"validation-{seed}"
        with run.screen.stage("search", f"{entry.label}, budget {budget}, seed {seed}") as report:
            return run_search(run, self._morphable, parsed, folder, report, evaluations)

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
            The plan with its loss in nats, regret and rank among all plans or half width of the regret's interval, the
            cost of the search and, where asked for, recall.
        """
        plan, truth = found.plan, self.truths.get(budget)
        if entry.serves_every_budget:
            parsed = self._run.budget(budget)
            plan = self._morphable.space(parsed).best(found.scores, parsed)
        details: Figures = {"scores": self._morphable.space(plan.budget).worth(found.scores).tolist()}
        if budget == FOUND:
            details["trace"] = found.trace
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
            half_width=truth.half_width(plan) if truth else None,
            cost=found.cost.to_dict(),
            recall=self.recall(plan),
            recall_questions=self._settings.recall_questions,
            details=details,
        )

    def recall(self, plan: Plan) -> float | None:
        """Recall of a plan on as many questions a task as the settings have; None for no questions."""
        return self._recalls.of(plan) if self._settings.recall_questions else None

    def after(self, cells: list[Cell]) -> list[Figures]:
        """The results after the same short distillation; empty unless the settings ask for it."""
        settings = self._settings
        if not settings.distill_steps:
            return []
        truth = self.truths[settings.distill_budget]
        cells = [cell for cell in cells if cell.strategy in settings.distilled]
        return after_distillation(
            self._run, self._morphable, cells, truth, settings.distill_steps, self._search, self._work / "after"
        )

    def _enumerate(self) -> Mapping[str, Reference]:
        """The losses of all plans of every budget, on the referee's split."""
        with self._run.screen.stage("referee", "every plan") as report:
            budgets, most = [self._run.budget(name) for name in self._settings.budgets], self._settings.max_plans
            space_of = self._morphable.space
            return find_truths(space_of, budgets, self._judging(), most, lambda share: report(round(100 * share), 100))

    def _find(self) -> Mapping[str, Reference]:
        """The best known plan of every budget, found by questions of the validation split and kept on disk."""
        return {
            str(budget): BestKnown(budget, self._found(budget), self._judging())
            for budget in map(self._run.budget, self._settings.budgets)
        }

    def _found(self, budget: Budget) -> Found:
        work, say = self._work / "reference", self._run.screen.say
        run = replace(self._run, recipe=self._run.recipe.model_copy(update={"seed": REFERENCE_SEED}))
        with run.screen.stage("reference", f"budget {budget}: the best known plan") as report:

            def find() -> Found:
                # Opened anew, so that what a reference costs does not depend on those of other budgets.
                objective = open_objective(run, self._morphable, work)
                space, state = self._morphable.space(budget), StateOnDisk(work / "gates", say)
                prices, most = prices_of(run.recipe.select.search), self._settings.reference_tokens
                return find_best_known(
                    space, budget, objective, prices, most, REFERENCE_SEED, state=state, report=report, say=say
                )

            return found_once(work / f"{digest_of(str(budget))}.json", find, say)

    def _judging(self) -> MorphableObjective:
        """Losses on the questions of the referee's split."""
        run = replace(self._run, recipe=self._run.recipe.model_copy(update={"seed": REFEREE_SEED}))
        return open_objective(run, self._morphable, self._work / "referee", self._search, judging="referee")


def prices_of(search: SearchSettings) -> Prices:
    """The most tokens of a question and of a gradient's batch."""
    return Prices(search.longest, max(search.batch_tokens, search.longest))
