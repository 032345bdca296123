"""Ways to choose which layers keep full attention.

A new strategy is one file with one function and one line in `STRATEGIES`; its summary line is what `--help` shows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flashmorph.selection.add_one import add_one
from flashmorph.selection.blocks import first, last, middle
from flashmorph.selection.budgeted_gates import budgeted_gates
from flashmorph.selection.drop_one import drop_one
from flashmorph.selection.exhaustive import exhaustive
from flashmorph.selection.gates import gates
from flashmorph.selection.greedy_backward import greedy_backward
from flashmorph.selection.greedy_forward import greedy_forward
from flashmorph.selection.halo import halo
from flashmorph.selection.kl import kl
from flashmorph.selection.l0 import l0
from flashmorph.selection.nll import nll
from flashmorph.selection.race import race
from flashmorph.selection.strategy import Cost, Objective, Selection, Strategy
from flashmorph.selection.tolerance import tolerance
from flashmorph.selection.uniform import uniform

STRATEGIES: dict[str, Strategy] = {
    "add-one": add_one,
    "budgeted-gates": budgeted_gates,
    "drop-one": drop_one,
    "exhaustive": exhaustive,
    "first": first,
    "gates": gates,
    "greedy-backward": greedy_backward,
    "greedy-forward": greedy_forward,
    "halo": halo,
    "kl": kl,
    "l0": l0,
    "last": last,
    "middle": middle,
    "nll": nll,
    "race": race,
    "tolerance": tolerance,
    "uniform": uniform,
}
NEED_TEXT = ("halo", "kl", "tolerance")
"""Strategies that look at the loss on text as well."""
NEED_TRAINING = ("kl", "tolerance")
"""Strategies that train weights (`Objective.distill`)."""
SERVE_EVERY_BUDGET = ("add-one", "drop-one", "first", "gates", "halo", "kl", "last", "middle", "nll")
"""Strategies whose scores do not depend on the budget: one search is cut at every count."""
FOLLOW_GRADIENTS = {"budgeted-gates": "answers", "gates": "hidden", "l0": "answers"}
"""Strategies that run one batch in each of their `steps`, and the loss that they ask for."""
SEARCH_NOTHING = ("first", "last", "middle", "uniform")
"""Strategies that ask the model nothing."""
WEIGH_TEXT_ALONE = ("kl", "tolerance")
"""Strategies that look at text and at no answer."""
DEFAULT_STRATEGY = "budgeted-gates"


class Needs(NamedTuple):
    """What the objective of a search must offer beside the loss of gates and plans."""

    text: bool = False
    training: bool = False


NOTHING = Needs()


def needs_of(strategy: str) -> Needs:
    """What a search by this strategy needs."""
    return Needs(strategy in NEED_TEXT, strategy in NEED_TRAINING)


def asks_questions(strategy: str, settings: Mapping[str, Any]) -> bool:
    """Whether the layers that a strategy chooses depend on answers to questions."""
    return strategy not in (*SEARCH_NOTHING, *WEIGH_TEXT_ALONE) and settings.get("data") != "text"


__all__ = [
    "NOTHING",
    "DEFAULT_STRATEGY",
    "FOLLOW_GRADIENTS",
    "NEED_TRAINING",
    "SEARCH_NOTHING",
    "SERVE_EVERY_BUDGET",
    "STRATEGIES",
    "Cost",
    "Needs",
    "Objective",
    "Selection",
    "Strategy",
    "asks_questions",
    "needs_of",
]
