"""Choosing which layers keep full attention: strategies, what they ask, and what answers.

Strategies see a `Space` and an `Objective`; only `objective.py` and `search.py` see a model.
"""

from flashmorph.selection.strategies import DEFAULT_STRATEGY, STRATEGIES
from flashmorph.selection.strategy import Cost, Objective, Selection, Strategy

__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "Cost", "Objective", "Selection", "Strategy"]
