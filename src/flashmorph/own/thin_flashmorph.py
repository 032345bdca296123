"""A weighted sample of the past by kernel halving.

This file travels with every checkpoint: it imports torch and transformers only.
"""

import math

import torch

from .mixer_flashmorph import State, masked_attention
from .rows_flashmorph import RowMixer, counted

Points = tuple[torch.Tensor, ...]
"""Keys and values, each `[batch, heads, points, head_dim]`."""
THRESHOLDS = ("greedy", "published")
_FAILURE = 0.5
"""The probability with which the published bound may fail."""


class Thin(RowMixer):
    """Attention to a weighted sample of the past: merge and reduce by kernel halving, beside an exact window.

    Thinformer's halving (Express, arXiv 2606.10944), in place of its schedule a binary counter: the newest tokens, at
    least `window` and fewer than `window + 2 · points`, and the first `sinks` are exact. Of the others every
    `2 · points` are halved to `points` of twice the weight; two such samples of one weight are halved together. After n
    tokens there are at most `points · log2(n / points)` of them, and the weights of all sum to n.

    Halving keeps one of each two neighbours, so that the sum over the kept ones of
    `exp(q · k / sqrt(head_dim)) v` stays close to half of the sum over all. `thresholds`: `greedy`, always the better
    sign, or `published`, at random where both are about as good.
    """

    def __init__(
        self,
        heads: int,
        groups: int,
        head_dim: int,
        width: int,
        points: int,
        window: int,
        sinks: int = 0,
        thresholds: str = "greedy",
    ):
        super().__init__(heads, groups, head_dim, width)
        if any(type(each) is not int for each in (points, window, sinks)) or points < 2 or window < 1 or sinks < 0:
            raise ValueError(
                f"thin heads need 2 points or more, a window and sinks from 0 on; got {points}, {window}, {sinks}"
            )
        if thresholds not in THRESHOLDS:
            raise ValueError(f"thresholds are {' or '.join(THRESHOLDS)}; got {thresholds}")
        self.points, self.window, self.sinks, self.thresholds = points, window, sinks, thresholds

    def held(self, count: int) -> tuple[int, int]:
        """Exact tokens and points of a sample after `count` tokens."""
        return held_after(count, self.points, self.window, self.sinks)

    def sizes(self, count: int) -> dict[str, int]:
        """The length of each tensor of the state."""
        exact, sampled = self.held(count)
        return {"k": exact, "v": exact, "points_k": sampled, "points_v": sampled}

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> torch.Tensor:
        """The output, piece by piece up to the next halving."""
        none = k[:, :, :0]
        held = state if state else {"k": none, "v": none, "points_k": none, "points_v": none}
        count = int(state["count"][0]) if state else 0
        exact, sample = (held["k"], held["v"]), (held["points_k"], held["points_v"])
        limit = self.sinks + self.window + 2 * self.points
        outputs, start = [], 0
        while start < k.shape[2]:
            stop = min(k.shape[2], start + limit - exact[0].shape[2])
            exact = tuple(torch.cat([kept, new[:, :, start:stop]], 2) for kept, new in zip(exact, (k, v), strict=True))
            outputs.append(self._attend(q[:, :, start:stop], exact, sample, count))
            count += stop - start
            if exact[0].shape[2] == limit:
                exact, sample = self._reduced(exact, sample, count)
            start = stop
        state.update(k=exact[0], v=exact[1], points_k=sample[0], points_v=sample[1], count=counted(len(k), count))
        return torch.cat(outputs, 2) if outputs else torch.zeros_like(q)

    def _attend(self, q: torch.Tensor, exact: Points, sample: Points, count: int) -> torch.Tensor:
        """Queries of the newest tokens: a point of weight w counts like w tokens, by log w on its scores."""
        time, near, far = q.shape[2], exact[0].shape[2], sample[0].shape[2]
        weights = torch.tensor([float(each) for each in self._weights(count)], device=q.device, dtype=q.dtype)
        causal = torch.ones(time, near, dtype=torch.bool, device=q.device).tril(near - time)
        seen = torch.zeros(time, near, dtype=q.dtype, device=q.device).masked_fill(~causal, -math.inf)
        mask = torch.cat([weights.log().expand(time, far), seen], 1)
        return masked_attention(
            q, torch.cat([sample[0], exact[0]], 2), torch.cat([sample[1], exact[1]], 2), mask, self.groups
        )

    def _weights(self, count: int) -> list[int]:
        """The weight of each point, the largest first: a part of the sample for each bit of the number of halvings."""
        halved = max(0, count - self.sinks - self.window) // (2 * self.points)
        bits = range(halved.bit_length() - 1, -1, -1)
        return [2 ** (bit + 1) for bit in bits if halved >> bit & 1 for _ in range(self.points)]

    def _reduced(self, exact: Points, sample: Points, count: int) -> tuple[Points, Points]:
        """Halve the oldest exact tokens, and with them every part of the sample that has their weight."""
        first, oldest = self.sinks, self.sinks + 2 * self.points
        carry: Points = tuple(each[:, :, first:oldest] for each in exact)
        exact = tuple(torch.cat([each[:, :, :first], each[:, :, oldest:]], 2) for each in exact)
        halved = (count - self.sinks - self.window) // (2 * self.points) - 1
        level = 0
        carry = self._halved(carry, count, level)
        while halved >> level & 1:
            carry = tuple(
                torch.cat([each[:, :, -self.points :], new], 2) for each, new in zip(sample, carry, strict=True)
            )
            sample = tuple(each[:, :, : -self.points] for each in sample)
            level += 1
            carry = self._halved(carry, count, level)
        return exact, tuple(torch.cat([each, new], 2) for each, new in zip(sample, carry, strict=True))

    def _halved(self, points: Points, count: int, level: int) -> Points:
        """One of each two neighbours."""
        with torch.no_grad():
            chosen = halve(points[0], points[1], self.thresholds, seed=count * 64 + level)
        index = chosen[..., None].expand(-1, -1, -1, points[0].shape[-1])
        return tuple(each.gather(2, index) for each in points)


def held_after(count: int, points: int, window: int, sinks: int = 0) -> tuple[int, int]:
    """How many exact tokens and how many points `Thin` holds after `count` tokens."""
    halved = max(0, count - sinks - window) // (2 * points)
    return count - 2 * points * halved, points * halved.bit_count()


def halve(k: torch.Tensor, v: torch.Tensor, thresholds: str, seed: int = 0) -> torch.Tensor:
    """The places `[batch, heads, points / 2]` of the points that stay, one of each two neighbours, in order.

    Kernel halving (Express, algorithm 6): signs are chosen one pair after the other so that the signed sum of the
    kernel `exp(k · k' / sqrt(head_dim)) (v · v' + b^2)` stays small, b the largest entry of a value.
    """
    k, v = k.float(), v.float()
    scores = k @ k.mT / math.sqrt(k.shape[-1])
    scores = scores - scores.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    bound = v.abs().amax((-2, -1))[..., None, None]
    kernel = scores.exp() * (v @ v.mT + bound**2)
    even, odd = kernel[..., 0::2, :], kernel[..., 1::2, :]
    apart = even[..., 0::2] - even[..., 1::2] - odd[..., 0::2] + odd[..., 1::2]
    pairs = apart.shape[-1]
    limits = torch.zeros(apart.shape[:-1], device=k.device)
    if thresholds == "published":
        sizes = apart.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        draws = torch.rand(pairs, generator=torch.Generator().manual_seed(seed)).to(k.device) * 2 - 1
        limits = draws * (0.5 + math.log(4 * pairs / _FAILURE)) * sizes * sizes.cummax(-1).values
    total = apart[..., 0, :].clone()
    swaps = [torch.zeros_like(total[..., 0], dtype=torch.bool)]
    for pair in range(1, pairs):
        swap = limits[..., pair] <= total[..., pair]
        total = total + torch.where(swap, -1.0, 1.0)[..., None] * apart[..., pair, :]
        swaps.append(swap)
    return 2 * torch.arange(pairs, device=k.device) + torch.stack(swaps, -1)
