"""Initialisation of a linear branch: statistics of the attention that it is trained to reproduce."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flashmorph.devices import with_float64
from flashmorph.mixers.mixer import LayerArguments

_RIDGE = 1e-2
_LOOKED_AT = 2_048
"""Tokens of a row that `mean_distance` looks at: it has all their scores."""


def softplus_inverse(value: torch.Tensor) -> torch.Tensor:
    """The inverse of softplus at `value`, which must be positive."""
    return value + torch.log(-torch.expm1(-value))


def constant_row(hidden: torch.Tensor, value: float) -> torch.Tensor:
    """The row `[width]` whose product with the hidden states `[batch, time, width]` is nearest to `value` everywhere.

    Ridge least squares: for projections that have no bias.
    """
    flat = _exact(hidden.flatten(0, 1))
    gram = flat.T @ flat
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, flat.sum(0)).to(hidden) * value


def mean_distance(attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
    """Mean distance in tokens that each head looks back, `[heads]`, at least one token.

    Over the beginnings of the rows `[batch, time, width]`, row by row, since the scores of eager attention are held.
    """
    implementation = attention.config._attn_implementation
    hidden = hidden[:, :_LOOKED_AT]
    time = hidden.shape[1]
    distance = torch.arange(time, device=hidden.device)[:, None] - torch.arange(time, device=hidden.device)
    mask = torch.zeros(time, time, dtype=hidden.dtype, device=hidden.device)
    mask = mask.masked_fill(distance < 0, torch.finfo(hidden.dtype).min)[None, None]
    cos, sin = (each[:, :time].expand(len(hidden), -1, -1).split(1) for each in arguments["position_embeddings"])
    means = []
    try:
        attention.config._attn_implementation = "eager"
        for row, *embeddings in zip(hidden.split(1), cos, sin, strict=True):
            own = {"attention_mask": mask, "position_embeddings": tuple(embeddings)}
            _, weights = attention(hidden_states=row, **{**arguments, **own})
            means.append(torch.einsum("bhqk,qk->h", weights, distance.to(weights.dtype)) / time)
    finally:
        attention.config._attn_implementation = implementation
    return torch.stack(means).mean(0).clamp_min(1.0)


def merged(parts: torch.Tensor, heads: int) -> torch.Tensor:
    """The mean of neighbouring parts, `[parts, ...]` to `[heads, ...]`."""
    return parts.unflatten(0, (heads, -1)).mean(1)


def narrow_scores(
    hidden: torch.Tensor, query: torch.Tensor, key: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of queries and keys `[heads, width, hidden]` whose products are nearest to those of wider ones.

    Least squares over pairs of the hidden states `[batch, time, hidden]`, of independent positions: the largest `width`
    singular directions of `Σq^½ Σk^½`, where Σ are the second moments.
    """
    if width == query.shape[1]:
        return query, key
    left, right = (_roots(_moments(hidden, rows)) for rows in (query, key))
    first, values, second = torch.linalg.svd(left[0] @ right[0])
    size = values[:, :width, None].sqrt()
    into_query = size * first[:, :, :width].mT @ left[1]
    into_key = size * second[:, :width] @ right[1]
    return into_query.to(query) @ query, into_key.to(key) @ key


def narrow_outputs(
    hidden: torch.Tensor, value: torch.Tensor, columns: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[heads, width, hidden]` and columns `[heads, width, hidden]` of the output projection, narrower ones.

    Their product is nearest to that of the wider ones over the hidden states `[batch, time, hidden]`: reduced-rank
    regression.
    """
    if width == value.shape[1]:
        return value, columns
    root, inverse = _roots(_moments(hidden, value))
    mixed = root @ _exact(columns)
    directions = torch.linalg.eigh(mixed @ mixed.mT)[1][:, :, -width:]
    down = (directions.mT @ inverse).to(value)
    return down @ value, (directions.mT @ mixed).to(columns)


def _exact(values: torch.Tensor) -> torch.Tensor:
    """In float64, on a device that has it."""
    return values.to(with_float64(values.device)).double()


def _moments(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Second moments `[heads, width, width]` of what rows `[heads, width, hidden]` make of the hidden states."""
    made = _exact(torch.einsum("nw,hdw->hnd", hidden.flatten(0, 1), rows))
    return made.mT @ made / made.shape[1]


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of each matrix and its inverse, directions that hardly occur left out of the latter."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(1e-9 * values.amax(-1, keepdim=True)).sqrt()[:, None]
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


def fit_head_scales(out_proj: nn.Linear, head_dim: int, run: Callable[[], Any], target: torch.Tensor) -> None:
    """Multiply each head's columns of `out_proj` by one factor, so that what `run()` gives is nearest to `target`.

    `target` is `[batch, time, width]`; `run` sends every head through `out_proj`. Least squares; heads whose columns
    are zero stay silent. The normal equations come from products of width by width, so the heads' outputs never exist
    side by side.
    """
    inputs = []
    handle = out_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    run()
    handle.remove()
    mixed, weight = _exact(inputs[0].flatten(0, -2)), out_proj.weight
    products = (mixed.T @ mixed) * _exact(weight.T @ weight)
    size = (-1, head_dim)
    gram = products.unflatten(1, size).sum(2).unflatten(0, size).sum(1)
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    towards = (mixed.T @ _exact(target.flatten(0, -2)) * _exact(weight.T)).sum(1).unflatten(0, size).sum(1)
    scales = torch.linalg.solve(gram, towards)
    weight.mul_(scales.to(weight).repeat_interleave(head_dim))
