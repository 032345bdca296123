"""The best known plan of a budget as what other plans are judged against, where there are too many to run all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmorph.evaluation import paired_interval
from flashmorph.inputs.shapes import has_broken_seal, sealed
from flashmorph.plan import Budget, Plan
from flashmorph.records import Figures
from flashmorph.referee.finding import Found, plan_of
from flashmorph.selection.cache import keep, kept
from flashmorph.selection.strategy import Objective

LEAST_QUESTIONS = 128
"""Of the referee: an interval over fewer says little."""


@dataclass(frozen=True)
class BestKnown:
    """A `Reference` whose plan is the best known one of `budget`.

    `objective` asks the questions of the referee's split, of which none had a part in finding it.
    """

    budget: Budget
    found: Found
    objective: Objective
    name: str = "best known"

    @property
    def plan(self) -> Plan:
        """The best known plan."""
        return plan_of(self.found, self.budget)

    def loss(self, plan: Plan) -> float:
        """Mean loss of `plan`, in nats."""
        return float(self._losses(plan).mean())

    def regret(self, plan: Plan) -> float:
        """Mean loss of `plan` minus that of the best known plan, in nats; negative where `plan` is better."""
        return float(self._differences(plan).mean())

    def rank(self, plan: Plan) -> None:
        """None: the number of better plans is not known."""

    def half_width(self, plan: Plan) -> float:
        """Half of the 95 % interval of the regret, in nats: a paired bootstrap over questions.

        Each question is a draw of its own, with replacement, of keys and of a position in the split's text, so
        questions are what is drawn anew. The interval is about questions from this text; it says nothing of another
        one.
        """
        low, high = paired_interval([self._differences(plan).tolist()], [[0.0] * self.objective.num_questions])
        return (high - low) / 2

    def to_dict(self) -> Figures:
        """The best known plan, where it came from, and what was spent on it."""
        found = self.found
        return {
            "reference": "found",
            "questions": self.objective.num_questions,
            "best_known": self.plan.assignments,
            "best_known_loss": self.loss(self.plan),
            "search_loss": found.loss,
            "came_from": found.came_from,
            "swaps": found.swaps,
            "local_search": "ended by itself" if found.ended else "stopped by the cap",
            "tokens": found.tokens,
            "plans_judged": found.plans_judged,
            "starts": found.starts,
            "left_out": found.left_out,
        }

    def _differences(self, plan: Plan) -> np.ndarray:
        return self._losses(plan) - self._losses(self.plan)

    def _losses(self, plan: Plan) -> np.ndarray:
        return self.objective.evaluate([plan])[0]


def found_once(path: Path, find: Callable[[], Found], say: Callable[[str], None]) -> Found:
    """What `find` gives, or gave when it was kept in `path`; `say` reports a damaged file, which is made again."""
    known = kept(path, say, Found)
    if known is not None and has_broken_seal(known):
        say(f"{path} is damaged: its digest is another; making it again")
        known = None
    if known is None:
        known = sealed(find().model_dump())
        keep(path, known)
    return Found.model_validate(known)
