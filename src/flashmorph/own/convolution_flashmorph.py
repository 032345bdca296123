"""Convolutions whose taps depend on the input. This file travels with every checkpoint: torch and transformers only."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .mixer_flashmorph import Starts, State


class DynamicConv(Starts):
    """A short causal convolution of queries, keys and values before RoPE, its taps made from the layer's input.

        y_t = x_t + sum over w < taps of (U_w z_t + s_w) * x_(t-w),   z_t = Z h_t

    for every channel (dynamic short convolutions, arXiv 2606.03825): `s_w` are static taps, `z_t` has `rank` numbers
    for each key-value head, where the paper has one z for all channels. Both kinds of taps start at 0, which is the
    identity. The state has the last `taps - 1` tokens before the convolution.
    """

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, taps: int = 4, rank: int = 15):
        super().__init__()
        if type(taps) is not int or type(rank) is not int or taps < 2 or rank < 0:
            raise ValueError(f"a convolution needs 2 taps or more and a rank from 0 on; got {taps} and {rank}")
        self.heads, self.groups, self.head_dim, self.taps, self.rank = heads, groups, head_dim, taps, rank
        channels = heads * (groups + 2) * head_dim
        self.static = nn.Parameter(torch.empty(channels, taps))
        if rank:
            self.into = nn.Parameter(torch.empty(heads * rank, width))
            self.out = nn.Parameter(torch.empty(channels, taps * rank))

    def reset(self) -> None:
        """The identity, with random `into`: where both factors were zero no gradient would enter."""
        init.zeros_(self.static)
        if self.rank:
            init.zeros_(self.out)
            width = self.into.shape[1]
            drawn = torch.rand(self.into.shape, generator=torch.Generator().manual_seed(0))
            init.copy_(self.into, (2 * drawn - 1) / width**0.5)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor,
        real: torch.Tensor | None,
        state: State | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, of the shapes of `OwnMixer.forward`; its other arguments as there."""
        x = torch.cat([q.unflatten(1, (self.heads, self.groups)), k[:, :, None], v[:, :, None]], 2)
        x = x.permute(0, 3, 1, 2, 4).flatten(2)
        if real is not None:
            x = x * real[..., None].to(x.dtype)
        before = state["rows"] if state else x.new_zeros(len(x), self.taps - 1, x.shape[2])
        rows, time = torch.cat([before, x], 1), x.shape[1]
        if state is not None:
            state["rows"] = rows[:, time:].clone()
        y = x
        dynamic = self._dynamic(hidden) if self.rank else None
        for tap in range(self.taps):
            weight = self.static[:, tap] if dynamic is None else self.static[:, tap] + dynamic(tap)
            y = y + weight.to(x.dtype) * rows[:, self.taps - 1 - tap : self.taps - 1 - tap + time]
        y = y.unflatten(2, (self.heads, self.groups + 2, self.head_dim)).permute(0, 2, 3, 1, 4)
        return y[:, :, : self.groups].flatten(1, 2), y[:, :, -2], y[:, :, -1]

    def _dynamic(self, hidden: torch.Tensor):
        z = F.linear(hidden.float(), self.into.float()).unflatten(-1, (self.heads, self.rank))
        out = self.out.float().view(self.heads, -1, self.taps, self.rank)

        def tap(number: int) -> torch.Tensor:
            return torch.einsum("bthr,hcr->bthc", z, out[:, :, number]).flatten(2)

        return tap
