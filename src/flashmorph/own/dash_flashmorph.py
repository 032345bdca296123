"""Attention to the chunks that 1.5-entmax routes to.

This file travels with every checkpoint: it imports torch and transformers only.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .mixer_flashmorph import State, masked_attention
from .rows_flashmorph import RowMixer, counted

VARIANTS = {
    "package": {"chunk": 64, "gamma": 1.0, "local": 1, "sigma": 1e6},
    "benchmark": {"chunk": 16, "gamma": 0.23, "local": 2, "sigma": 1e8},
}
"""The two published implementations by their settings: the package `dash_attn`, and the model of the paper's figures.

Not reproduced: the latter also rotates its summary query, position by position, and divides probabilities by 16."""


class Dash(RowMixer):
    """DashAttention (arXiv 2605.18753): attention to whole chunks of earlier tokens, those that a query routes to.

    A chunk c has the summary `kbar_c = softmax(qbar · k_t / sqrt(head_dim)) k_t` over its tokens t, with a learned
    query `qbar` for each key-value head; at 0, its start, that is the mean. A query routes with

        p = entmax1.5(gamma q · kbar_c / sqrt(head_dim))

    over all chunks before its own, its probabilities averaged over the query heads of a key-value head. It attends
    exactly to the chunks with `p_c > 0` and to the newest `local` ones, its own included, with `log(p_c) / sigma` less
    its mean on the scores of the former: next to nothing in size, it is what carries gradients to `qbar`. At gamma 0
    every chunk is kept: full attention.

    It saves reading and no memory: the state has all keys and values, and a summary for each finished chunk.
    """

    block = 128
    gamma: torch.Tensor

    def __init__(
        self,
        heads: int,
        groups: int,
        head_dim: int,
        width: int,
        chunk: int,
        gamma: float = 1.0,
        local: int = 1,
        sigma: float = 1e6,
        density: float | None = None,
    ):
        super().__init__(heads, groups, head_dim, width)
        if any(type(each) is not int for each in (chunk, local)) or chunk < 2 or local < 1:
            raise ValueError(
                f"dash heads need chunks of 2 tokens or more, 1 or more of them local; got {chunk}, {local}"
            )
        if not gamma >= 0 or not sigma > 0:
            raise ValueError(f"dash heads need a gamma of 0 or more and a sigma above 0; got {gamma}, {sigma}")
        if density is not None and not 0 < density <= 1:
            raise ValueError(
                f"the density of dash heads is a share of the chunks, above 0 and at most 1; got {density}"
            )
        self.chunk, self.local, self.sigma, self._gamma = chunk, local, float(sigma), float(gamma)
        self.density = density
        self.samples: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self.summary_query = nn.Parameter(torch.empty(heads * head_dim))
        # A buffer that is stored: calibration sets it, and heads keep their own when a plan takes some of them.
        self.register_buffer("gamma", torch.empty(heads))

    def reset(self) -> None:
        """Mean pooling, and gamma as the settings have it."""
        init.zeros_(self.summary_query)
        init.constant_(self.gamma, self._gamma)

    def sizes(self, count: int) -> dict[str, int]:
        """The length of each tensor of the state."""
        return {"k": count, "v": count, "summaries": count // self.chunk}

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> torch.Tensor:
        """The output: a single query reads the chunks that it keeps, several ones mask the others."""
        before = int(state["count"][0]) if state else 0
        held = [torch.cat([state[name], new], 2) if state else new for name, new in (("k", k), ("v", v))]
        keys, values = held
        done = before // self.chunk
        new = self.summaries(keys[:, :, done * self.chunk :])
        summaries = torch.cat([state["summaries"], new], 2) if state else new
        state.update(k=keys, v=values, summaries=summaries, count=counted(len(k), keys.shape[2]))
        if q.shape[2] == 1:
            return self._read(q, keys, values, summaries)
        if self.groups > 1:
            keys, values = (each.repeat_interleave(self.groups, 1) for each in (keys, values))
        # The masks of all blocks together are as large as all scores: for a gradient each is made again.
        masked = partial(checkpoint, self._masked, use_reentrant=False) if torch.is_grad_enabled() else self._masked
        outputs = [
            masked(q[:, :, start : start + self.block], keys, values, summaries, before + start)
            for start in range(0, q.shape[2], self.block)
        ]
        return torch.cat(outputs, 2) if outputs else torch.zeros_like(q)

    def summaries(self, keys: torch.Tensor) -> torch.Tensor:
        """Of each whole chunk of keys `[batch, heads, time, dim]`, `[batch, heads, chunks, dim]`."""
        chunks = keys.shape[2] // self.chunk
        parts = keys[:, :, : chunks * self.chunk].unflatten(2, (chunks, self.chunk))
        query = self.summary_query.to(keys.dtype).view(self.heads, 1, self.head_dim, 1)
        weights = (parts @ query / math.sqrt(self.head_dim)).float().softmax(3)
        return (weights.to(keys.dtype) * parts).sum(3)

    def routed(
        self, q: torch.Tensor, summaries: torch.Tensor, before: int, gamma: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Probabilities `[batch, heads, time, chunks]` of queries from token `before` on, 0 from their own chunk on.

        With another `gamma` `[heads]` than its own where one is given.
        """
        own = (torch.arange(before, before + q.shape[2], device=q.device) // self.chunk)[:, None]
        chunks = (before + q.shape[2] - 1) // self.chunk
        earlier = torch.arange(chunks, device=q.device) < own
        queries = q.float().unflatten(1, (self.heads, self.groups))
        scores = queries @ summaries[:, :, None, :chunks].float().mT / math.sqrt(self.head_dim)
        scores = scores * (self.gamma if gamma is None else gamma).float()[:, None, None, None]
        # The lowest number instead of infinity: a query of the first chunk has no other, and no probabilities.
        shares = entmax15(scores.masked_fill(~earlier, torch.finfo(scores.dtype).min / 4)) if chunks else scores
        return shares.mean(2) * earlier

    def sample(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Keep the newest queries of a text and its summaries, for a gamma to be chosen by."""
        newest = q[:, :, -self.block :].clone()  # A view would keep all queries.
        self.samples.append((newest, self.summaries(k), k.shape[2] - newest.shape[2]))

    def kept_share(self, q: torch.Tensor, summaries: torch.Tensor, before: int, gamma: float) -> float:
        """The mean share of the chunks up to their own that queries attend to at this gamma."""
        own = torch.arange(before, before + q.shape[2], device=q.device) // self.chunk
        shares = self.routed(q, summaries, before, torch.full_like(self.gamma, gamma))
        kept = self._bias(shares, own[:, None]) > -math.inf
        seen = (kept & (torch.arange(shares.shape[-1], device=q.device) < own[:, None])).sum(-1) + 1
        return (seen / (own + 1)).mean().item()

    def _bias(self, shares: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What chunks add to scores, `[..., chunks]`: minus infinity for those that are not kept."""
        kept = shares > 0
        logs = shares.clamp_min(1e-20).log()
        mean = (logs * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
        bias = ((logs - mean.detach()) / self.sigma).masked_fill(~kept, -math.inf)
        local = torch.arange(shares.shape[-1], device=own.device) > own - self.local
        return bias.masked_fill(local & ~kept, 0.0)

    def _masked(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, summaries: torch.Tensor, before: int
    ) -> torch.Tensor:
        """The output of a block of queries from token `before` on; `keys` and `values` have their head for each."""
        time, stop = q.shape[2], before + q.shape[2]
        positions = torch.arange(before, stop, device=q.device)[:, None]
        bias = self._bias(self.routed(q, summaries, before), positions // self.chunk)
        inside = (stop - 1) // self.chunk * self.chunk
        spread = bias.repeat_interleave(self.chunk, -1)
        tail = torch.zeros(*bias.shape[:2], time, stop - inside, device=q.device)
        numbers = torch.arange(stop, device=q.device)
        # A query's own chunk is not among those that it routes to.
        mine = numbers // self.chunk == positions // self.chunk
        mask = torch.cat([spread, tail], -1).masked_fill(mine, 0.0).masked_fill(numbers > positions, -math.inf)
        mask = mask.to(q.dtype).repeat_interleave(self.groups, 1)
        return masked_attention(q, keys[:, :, :stop], values[:, :, :stop], mask, 1)

    def _read(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
        """The output of one query, the newest token's, which reads the chunks that it keeps and no others."""
        last = keys.shape[2] - 1
        chunks = last // self.chunk
        bias = self._bias(self.routed(q, summaries, last), torch.full((1, 1), chunks, device=q.device))[:, :, 0]
        most = int((bias > -math.inf).sum(-1).max()) if chunks else 0
        top = (bias > -math.inf).float().topk(most, -1).indices
        index = top[..., None, None].expand(-1, -1, -1, self.chunk, self.head_dim)
        parts = []
        for held in (keys, values):
            whole = held[:, :, : chunks * self.chunk].unflatten(2, (chunks, self.chunk))
            parts.append(torch.cat([whole.gather(2, index).flatten(2, 3), held[:, :, chunks * self.chunk :]], 2))
        kept = bias.gather(-1, top).repeat_interleave(self.chunk, -1)
        mask = torch.cat([kept, kept.new_zeros(*kept.shape[:2], last + 1 - chunks * self.chunk)], -1)
        mask = mask.to(q.dtype).repeat_interleave(self.groups, 1)[:, :, None]
        return masked_attention(q, parts[0], parts[1], mask, self.groups)


def entmax15(scores: torch.Tensor) -> torch.Tensor:
    """1.5-entmax over the last dimension, exactly: `(x - tau)_+^2` with `x = scores / 2`, its sum 1.

    By sorting (Peters et al., arXiv 1905.05702, algorithm 2). tau gets its gradient from the derivative of that sum.
    """
    x = scores / 2
    x = x - x.detach().amax(-1, keepdim=True)
    with torch.no_grad():
        ordered = x.sort(-1, descending=True).values
        number = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        mean, square = ordered.cumsum(-1) / number, ordered.square().cumsum(-1) / number
        limits = mean - ((1 - number * (square - mean.square())) / number).clamp_min(0).sqrt()
        support = (limits <= ordered).sum(-1, keepdim=True)
        tau = limits.gather(-1, support - 1)
        slope = (x - tau).clamp_min(0)
    tau = tau + (slope * (x - x.detach())).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    return (x - tau).clamp_min(0).square()
