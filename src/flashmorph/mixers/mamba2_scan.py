"""The scan of Mamba2 as matrix products (arXiv 2405.21060, section 6), for where no kernel runs."""

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 32
"""Tokens of a chunk: with more the products within chunks grow, with fewer the steps from chunk to chunk."""


def chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`S = exp(dt · A) · S + dt · x Bᵀ`, `y = S C + D · x`: what transformers' `mamba2_chunk_scan` computes.

    Queries meet keys once for each group, not for each head, and chunks are shorter than the kernels' (`chunk_size`).

    Args:
        hidden_states: x, `[batch, time, heads, head_dim]`.
        dt: Steps before bias, softplus and limits, `[batch, time, heads]`.
        A: Rates, negative, `[heads]`.
        B: Keys, `[batch, time, groups, state]`; a group is so many neighbouring heads.
        C: Queries, of the same shape.
        chunk_size: Tokens of a chunk at most.
        D: What passes by the state, `[heads]`.
        dt_bias: `[heads]`.
        initial_states: The state before the first token, `[batch, heads, head_dim, state]`.
        dt_softplus: Whether softplus comes before the limits.
        dt_limit: Smallest and largest step.
        return_final_states: Whether the state after the last token is returned as well.
        kwargs: Arguments of the kernels that change nothing here.

    Returns:
        y in float32, `[batch, time, heads, head_dim]`, and the last state where asked for.
    """
    time, groups, chunk = hidden_states.shape[1], B.shape[2], min(chunk_size, CHUNK)
    padding = -time % chunk

    def chunks(values: torch.Tensor) -> torch.Tensor:
        """`[batch, time, heads, channels]` -> `[batch, heads, chunks, chunk, channels]`."""
        return F.pad(values, (0, 0, 0, 0, 0, padding)).transpose(1, 2).unflatten(2, (-1, chunk))

    def by_group(heads: torch.Tensor) -> torch.Tensor:
        """`[batch, heads, ...]` -> `[batch, groups, heads of a group, ...]`."""
        return heads.unflatten(1, (groups, -1))

    steps = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit).float()
    with torch.autocast(hidden_states.device.type, enabled=False):
        x = hidden_states.float()
        # A padded token has x = 0 and a rate of 0: it leaves the state as it is.
        values = by_group(chunks(x * steps[..., None]))
        keys, queries = chunks(B.float())[:, :, None], chunks(C.float())[:, :, None]
        decay = by_group(chunks((A.float() * steps)[..., None])).squeeze(-1).cumsum(-1)
        last = decay[..., -1:]

        later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
        within = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -torch.inf).exp()
        y = (queries @ keys.mT * within) @ values

        written = keys.mT @ (values * (last - decay).exp()[..., None])
        state = torch.zeros_like(written[:, :, :, 0]) if initial_states is None else by_group(initial_states.float().mT)
        before = []
        for kept, new in zip(last.exp()[..., None].unbind(3), written.unbind(3), strict=True):
            before.append(state)
            state = torch.addcmul(new, state, kept)
        y = y + queries @ torch.stack(before, 3) * decay.exp()[..., None]

        y = y.flatten(1, 2).flatten(2, 3).transpose(1, 2)[:, :time]
        y = y.contiguous() if D is None else y + D[:, None] * x
    return (y, state.mT.flatten(1, 2)) if return_final_states else y
