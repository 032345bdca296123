"""What made-up objectives of searches have in common: progress is held within its bounds."""

from typing import Any

import numpy as np

from flashmorph.plan import Budget, Space
from flashmorph.selection import Search


def effects_like(worth: Any, groups: int, pairs: int) -> np.ndarray:
    """Effects `[2, pairs, groups]` in the proportions of what each group is worth, alike in two tasks."""
    shares = np.maximum(np.asarray(worth, dtype=float), 0)[:groups]
    return np.tile(shares / max(shares.max(), 1e-9), (2, pairs, 1))


class Forgetful:
    """The part of an `Objective` that has nothing to do with losses."""

    num_tasks = 1

    def resume(self, cost) -> None:
        pass


def within_bounds(done: float, total: float, **figures: float) -> None:
    """Takes the progress of a search."""
    assert 0 < done <= total


def search_on(space: Space, budget: Budget, objective: Any, seed: int = 0, **more: Any) -> Search:
    """What a strategy is given."""
    return Search(space, budget, objective, seed, report=within_bounds, **more)
