"""A weighted sample of the past by kernel halving.

This file travels with every checkpoint: it imports torch and transformers only.
"""

import math

import torch

from .halving_flashmorph import HALVINGS, halve, halve_by_coin
from .mixer_flashmorph import State, masked_attention
from .rows_flashmorph import RowMixer, counted

Points = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each `[batch, heads, points, head_dim]`."""
SCHEDULES = ("reduce", "express")


class Thin(RowMixer):
    """Attention to a weighted sample of the past by kernel halving (Express, arXiv 2606.10944), beside an exact window.

    The newest tokens, at least `window` and fewer than `window + 2 · points`, and the first `sinks` are exact. Of the
    others every `2 · points` join the sample together. A point of the sample stands for a power of two of tokens, its
    weight, and the weights of all points and exact tokens sum to the tokens seen.

    `schedule`, what is halved with what:

    - `reduce`: merge and reduce, a binary counter. Every `2 · points` tokens are halved; two halves of one weight are
      halved together. After n tokens there are at most `points · log2(n / points)` points.
    - `express`: the bounded cache of the paper in our reconstruction, since its code is not public; see `Express`.
      After n tokens there are fewer than `6 · points + log2(n)` points.

    `halving`: the rule by which one of each two neighbours stays, see `halve`.
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
        schedule: str = "reduce",
        halving: str = "greedy",
    ):
        super().__init__(heads, groups, head_dim, width)
        if any(type(each) is not int for each in (points, window, sinks)) or points < 2 or window < 1 or sinks < 0:
            raise ValueError(
                f"thin heads need 2 points or more, a window and sinks from 0 on; got {points}, {window}, {sinks}"
            )
        if halving not in HALVINGS:
            raise ValueError(f"the halving of thin heads is {' or '.join(HALVINGS)}; got {halving}")
        self.points, self.window, self.sinks, self.halving = points, window, sinks, halving
        self.schedule = schedule_of(schedule, points)

    def held(self, count: int) -> tuple[int, int]:
        """Exact tokens and points of a sample after `count` tokens."""
        exact, weights = self.weights(count)
        return exact, sum(weights)

    def weights(self, count: int) -> tuple[int, list[int]]:
        """Exact tokens after `count` tokens, and how many points of weight 1, 2, 4, ... there are."""
        return _weights(count, self.schedule, self.window, self.sinks)

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
            exact = joined(exact, (k[:, :, start:stop], v[:, :, start:stop]))
            outputs.append(self._attend(q[:, :, start:stop], exact, sample, count))
            count += stop - start
            if exact[0].shape[2] == limit:
                exact, sample = self._grown(exact, sample, count)
            start = stop
        state.update(k=exact[0], v=exact[1], points_k=sample[0], points_v=sample[1], count=counted(len(k), count))
        return torch.cat(outputs, 2) if outputs else torch.zeros_like(q)

    def _attend(self, q: torch.Tensor, exact: Points, sample: Points, count: int) -> torch.Tensor:
        """Queries of the newest tokens: a point of weight w counts like w tokens, by log w on its scores."""
        time, near = q.shape[2], exact[0].shape[2]
        sizes = self.weights(count)[1][::-1]
        levels = torch.arange(len(sizes) - 1, -1, -1).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        logs = (levels * math.log(2)).to(q.device, q.dtype)
        causal = torch.ones(time, near, dtype=torch.bool, device=q.device).tril(near - time)
        seen = torch.zeros(time, near, dtype=q.dtype, device=q.device).masked_fill(~causal, -math.inf)
        keys, values = joined(sample, exact)
        return masked_attention(q, keys, values, torch.cat([logs.expand(time, -1), seen], 1), self.groups)

    def _grown(self, exact: Points, sample: Points, count: int) -> tuple[Points, Points]:
        """Move the oldest exact tokens but the sinks into the sample."""
        blocks = (count - self.sinks - self.window) // (2 * self.points) - 1
        waiting = self.schedule.sizes(blocks)
        first, oldest = self.sinks, self.sinks + 2 * self.points
        new = (exact[0][:, :, first:oldest], exact[1][:, :, first:oldest])
        exact = joined(*((exact[0][:, :, part], exact[1][:, :, part]) for part in (slice(first), slice(oldest, None))))
        for level, (bucket, by_coin) in enumerate(self.schedule.ladder(blocks)):
            rest = sample[0].shape[2] - waiting[level]
            new = joined((sample[0][:, :, rest:], sample[1][:, :, rest:]), new)
            sample = (sample[0][:, :, :rest], sample[1][:, :, :rest])
            if new[0].shape[2] < bucket:
                return exact, joined(sample, new)
            new = self._halved(new, bucket, by_coin, seed=count * 64 + level)
        sample = joined(sample, new)
        for level, bucket in enumerate(self.schedule.full(blocks, sample[0].shape[2])):
            sample = self._halved(sample, bucket, False, seed=count * 64 + 32 + level)
        return exact, sample

    def _halved(self, points: Points, bucket: int, by_coin: bool, seed: int) -> Points:
        """One of each two neighbours, decided apart in each bucket of as many points.

        Which ones stay has no gradient; those that stay keep theirs.
        """
        k, v = (each.unflatten(2, (-1, bucket)) for each in points)
        with torch.no_grad():
            chosen = halve_by_coin(k, seed) if by_coin else halve(k, v, self.halving, seed)
        index = chosen[..., None].expand(*chosen.shape, k.shape[-1])
        return k.gather(3, index).flatten(2, 3), v.gather(3, index).flatten(2, 3)


class Reduce:
    """Merge and reduce: points of every weight wait until there are `2 · points` of them, and are halved."""

    def __init__(self, points: int):
        self.points = points

    def sizes(self, blocks: int) -> list[int]:
        """How many points of weight 1, 2, 4, ... there are after `blocks` times `2 · points` tokens."""
        return [0, *(self.points * (blocks >> bit & 1) for bit in range(blocks.bit_length() + 1))]

    def ladder(self, blocks: int) -> list[tuple[int, bool]]:
        """For each weight that the next block may climb from: points that are halved together, and not by a coin."""
        return [(2 * self.points, False)] * (blocks + 1).bit_length()

    def full(self, blocks: int, points: int) -> list[int]:
        """Nothing is halved beyond the ladder."""
        return []


class Express:
    """Our reconstruction of the bookkeeping of Express: a cache of `points` to `4 · points` points of one weight.

    The first `4 · points` tokens fill the cache, at weight 1. A full cache is halved twice: its weight is now `2^m`,
    with m two higher than before. It fills up by three times `points` new points of that weight, each of `2^m · points`
    tokens, which climb a ladder of m halvings on the way. The last log2(points) of them are kernel halvings of buckets
    of 4, 8, ..., 2 · points points, in the order of the tokens (Compress, arXiv 2111.07941); the ones before, where the
    weight is higher, keep one of two by a coin. What waits on the ladder for a full bucket is seen with the weight that
    it has.
    """

    def __init__(self, points: int):
        if points & (points - 1):
            raise ValueError(f"the schedule express of thin heads needs a power of two of points; got {points}")
        self.points = points

    def sizes(self, blocks: int) -> list[int]:
        """How many points of weight 1, 2, 4, ... there are after `blocks` times `2 · points` tokens."""
        top = self._top(blocks)
        cached = self.points << top if top else 0
        parts, rest = divmod(2 * self.points * blocks - cached, self.points << top)
        waiting = []
        for bucket, _ in self.ladder(blocks):
            waiting.append(rest % bucket)
            rest = rest // bucket * (bucket // 2)
        return [*waiting, self.points * (parts + (top > 0))]

    def ladder(self, blocks: int) -> list[tuple[int, bool]]:
        """For each weight below the cache's: points that are halved together, and whether by a coin."""
        top = self._top(blocks)
        by_kernel = min(top, self.points.bit_length() - 1)
        buckets = [2 * self.points >> step for step in range(by_kernel)]
        return [(2, True)] * (top - by_kernel) + [(bucket, False) for bucket in reversed(buckets)]

    def full(self, blocks: int, points: int) -> list[int]:
        """The buckets by which a cache of as many points is halved, and halved again, if it is full."""
        return [4 * self.points, 2 * self.points] if points == 4 * self.points else []

    def _top(self, blocks: int) -> int:
        """The logarithm of the cache's weight: 0 below `4 · points` tokens, then two more each time they quadruple."""
        return blocks.bit_length() // 2 * 2


def schedule_of(name: str, points: int) -> Reduce | Express:
    """The bookkeeping of a schedule.

    Raises:
        ValueError: there is no such schedule, or it does not take that many points.
    """
    if name not in SCHEDULES:
        raise ValueError(f"the schedule of thin heads is {' or '.join(SCHEDULES)}; got {name}")
    return Reduce(points) if name == "reduce" else Express(points)


def held_after(count: int, points: int, window: int, sinks: int = 0, schedule: str = "reduce") -> tuple[int, int]:
    """How many exact tokens and how many points `Thin` holds after `count` tokens."""
    exact, weights = _weights(count, schedule_of(schedule, points), window, sinks)
    return exact, sum(weights)


def joined(one: Points, other: Points) -> Points:
    """All points of both."""
    return torch.cat([one[0], other[0]], 2), torch.cat([one[1], other[1]], 2)


def _weights(count: int, schedule: Reduce | Express, window: int, sinks: int) -> tuple[int, list[int]]:
    blocks = max(0, count - sinks - window) // (2 * schedule.points)
    return count - 2 * schedule.points * blocks, schedule.sizes(blocks)
