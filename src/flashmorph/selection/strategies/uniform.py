"""Every n-th layer full, as hybrid models are usually laid out (Qwen3-Next: the last of each four)."""

from typing import Annotated

from pydantic import Field

from flashmorph.errors import UserError
from flashmorph.selection.strategy import Search, Selection, Strategy, group_scores, layer_scores


def uniform(
    search: Search,
    offset: Annotated[int, Field(ge=0)] | None = None,
) -> Selection:
    """One full layer in each of K groups of (nearly) equal size: the last one, or the one at `offset` from its start.

    Raises:
        UserError: see `Space.limit`; or `offset` is beyond the smallest group.
    """
    space, budget = search.space, search.budget
    layers = len(space.layers)
    groups = len(space.best(group_scores(space, [0.0] * len(space.groups)), budget).full_groups)
    kept = max(1, groups * layers // len(space.groups))
    edges = [round(layers * number / kept) for number in range(kept + 1)]
    smallest = min(stop - start for start, stop in zip(edges, edges[1:], strict=False))
    if offset is not None and not 0 <= offset < smallest:
        raise UserError(
            f"strategy uniform: offset must be at most {smallest - 1} for {kept} of {layers} layers; got {offset}"
        )
    chosen = [stop - 1 if offset is None else start + offset for start, stop in zip(edges, edges[1:], strict=False)]
    scores = layer_scores(space, [float(layer in chosen) for layer in range(layers)])
    return Selection(space.best(scores, budget), scores)


UNIFORM = Strategy(uniform, searches=False, asks_questions=False, seeded=False)
