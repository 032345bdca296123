"""Choosing which layers keep full attention: strategies, what they ask, and what answers.

Strategies see a `Search`: a `Space`, a `Budget` and an `Objective`, never a model; that is seen by `objective.py` and
the modules that it works with.
"""

from flashmorph.selection.strategies import BASELINE, DEFAULT_STRATEGY, STRATEGIES
from flashmorph.selection.strategy import Cost, Search, Selection, Strategy

__all__ = ["BASELINE", "DEFAULT_STRATEGY", "STRATEGIES", "Cost", "Search", "Selection", "Strategy"]
