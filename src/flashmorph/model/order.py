"""In which order plans are run, so that layers that neighbours share are computed once."""

import torch


def rows_by_layer(groups: int, layers: int) -> list[range]:
    """The rows of each layer in gates of so many groups, which are the layers or the key-value heads of each."""
    heads = groups // layers
    return [range(layer * heads, (layer + 1) * heads) for layer in range(layers)]


def run_order(gates: torch.Tensor, num_layers: int) -> list[tuple[int, int]]:
    """(index, first layer to run) of each hard plan in `gates` `[plans, groups, options]`, neighbours together.

    A plan that equals the one before starts with
    the last layer, so that something is run.
    """
    layers = rows_by_layer(gates.shape[1], num_layers)
    chosen = [tuple(tuple(plan[row] for row in rows) for rows in layers) for plan in gates.argmax(-1).tolist()]
    order: list[tuple[int, int]] = []
    before: tuple[tuple[int, ...], ...] | None = None
    for index in sorted(range(len(chosen)), key=chosen.__getitem__):
        plan = chosen[index]
        start = 0
        if before is not None:
            differing = [layer for layer in range(len(plan)) if plan[layer] != before[layer]]
            start = differing[0] if differing else len(plan) - 1
        order.append((index, start))
        before = plan
    return order
