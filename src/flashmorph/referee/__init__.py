"""Who chooses best? The loss of every plan, on a split that no search has seen, judges the plan of every strategy."""

from flashmorph.referee.compare import CompareSettings, compare

__all__ = ["CompareSettings", "compare"]
