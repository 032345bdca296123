"""One block of full layers at the start, the end or the middle: what a search must beat to be worth anything."""

from flashmorph.selection.strategy import Search, Selection, Strategy, layer_scores


def first(search: Search) -> Selection:
    """The first layers full.

    Raises:
        UserError: see `Space.limit`.
    """
    layers = len(search.space.layers)
    return _block(search, [float(layers - layer) for layer in range(layers)])


def last(search: Search) -> Selection:
    """The last layers full.

    Raises:
        UserError: see `Space.limit`.
    """
    return _block(search, [layer + 1.0 for layer in range(len(search.space.layers))])


def middle(search: Search) -> Selection:
    """The layers around the middle full, the lower one where two are as far from it.

    Raises:
        UserError: see `Space.limit`.
    """
    layers = len(search.space.layers)
    return _block(search, [layers - abs(layer - (layers - 1) / 2) for layer in range(layers)])


def _block(search: Search, values: list[float]) -> Selection:
    scores = layer_scores(search.space, values)
    return Selection(search.space.best(scores, search.budget), scores)


FIRST, LAST, MIDDLE = (
    Strategy(run, reuse="scores", searches=False, asks_questions=False, seeded=False) for run in (first, last, middle)
)
