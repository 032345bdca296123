"""One block of full layers at the start, the end or the middle: what a search must beat to be worth anything."""

from flashmorph.plan import Budget, Space
from flashmorph.selection.strategy import Objective, Selection, Strategy, layer_scores


def first(space: Space, budget: Budget, objective: Objective | None, seed: int) -> Selection:
    """The first layers full.

    Nothing is searched: `objective` and `seed` are not used.

    Raises:
        UserError: see `Space.limit`.
    """
    layers = len(space.layers)
    return _block(space, budget, [float(layers - layer) for layer in range(layers)])


def last(space: Space, budget: Budget, objective: Objective | None, seed: int) -> Selection:
    """The last layers full.

    Nothing is searched: `objective` and `seed` are not used.

    Raises:
        UserError: see `Space.limit`.
    """
    return _block(space, budget, [layer + 1.0 for layer in range(len(space.layers))])


def middle(space: Space, budget: Budget, objective: Objective | None, seed: int) -> Selection:
    """The layers around the middle full, the lower one where two are as far from it.

    Nothing is searched: `objective` and `seed` are not used.

    Raises:
        UserError: see `Space.limit`.
    """
    layers = len(space.layers)
    return _block(space, budget, [layers - abs(layer - (layers - 1) / 2) for layer in range(layers)])


def _block(space: Space, budget: Budget, values: list[float]) -> Selection:
    scores = layer_scores(space, values)
    return Selection(space.best(scores, budget), scores)


FIRST, LAST, MIDDLE = (
    Strategy(run, reuse="scores", searches=False, asks_questions=False, seeded=False) for run in (first, last, middle)
)
