"""What a comparison runs: strategies with their settings, by seed, spend and budget."""

from collections.abc import Iterator
from dataclasses import dataclass

from flashmorph.errors import UserError, unknown
from flashmorph.plan import Budget
from flashmorph.recipe.recipe import parse_changes
from flashmorph.records import Figures, SettingValues
from flashmorph.referee.settings import CompareSettings
from flashmorph.run.run import Run
from flashmorph.selection import STRATEGIES, Strategy
from flashmorph.selection.search import own_settings, reuse_of

FOUND = "found"
"""The name of the budget in cells of strategies that choose their own."""
Wanted = tuple["Entry", int, float, tuple[str, ...]]
"""An entry, the seed of its search, its spend and the budgets."""


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


def wanted(settings: CompareSettings) -> Iterator[Wanted]:
    """(strategy, seed, spend, budgets) of every search, the cheap ones first."""
    entries = [Entry.parse(label) for label in settings.strategies]
    for entry in sorted(entries, key=lambda entry: (entry.record.searches, not entry.serves_every_budget)):
        seeds = settings.seeds if entry.record.seeded else 1
        spends = settings.spends if entry.knob else (1.0,)
        budgets = (FOUND,) if entry.record.finds_budget else settings.budgets
        yield from ((entry, seed, spend, budgets) for seed in range(seeds) for spend in spends)


def budget_of(run: Run, name: str) -> Budget:
    """A budget of a run by its name; one layer for strategies that choose their own."""
    return Budget("layers", 1) if name == FOUND else run.budget(name)
