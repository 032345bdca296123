"""Who chooses best? Plans are judged on a split that no search has seen, against all plans or the best known one."""

from flashmorph.referee.compare import compare
from flashmorph.referee.settings import CompareSettings

__all__ = ["CompareSettings", "compare"]
