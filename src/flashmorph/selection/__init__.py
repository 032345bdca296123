"""Choosing which layers keep full attention: strategies, what they ask, and what answers.

Strategies see a `Search`: a `Space`, a `Budget` and an `Objective`. A model is seen by `model_losses.py` and
what counts (`ledger.py`), distils (`distilling.py`), patches (`effects.py`) and opens (`search.py`) for it.
"""

from flashmorph.selection.strategies import BASELINE, DEFAULT_STRATEGY, STRATEGIES
from flashmorph.selection.strategy import Cost, Search, Selection, Strategy

__all__ = ["BASELINE", "DEFAULT_STRATEGY", "STRATEGIES", "Cost", "Search", "Selection", "Strategy"]
