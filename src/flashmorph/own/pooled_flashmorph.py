"""Attention pooled by segment. This file travels with every checkpoint: it imports torch and transformers only."""

import math

import torch

from .mixer_flashmorph import State, masked_attention
from .rows_flashmorph import RowMixer, counted


class Pooled(RowMixer):
    """Attention to one key and one value for each earlier segment of tokens, beside an exact window.

    What is left of Nystromformer (arXiv 2102.03902) where it is causal and its state small: the landmark of a segment
    is the mean of its keys, and its value is what the mean of its queries sees of the segment,

        kl_i = mean(K_i),   c_i = softmax(mean(Q_i) K_i^T / sqrt(head_dim)) V_i

    with one `c_i` for each query head. The first `sinks` tokens and the newest ones, at least `window` and fewer than
    `window + segment`, are exact; a segment counts like as many tokens as it has, by the logarithm of their number on
    its score.
    """

    block = 256

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, segment: int, window: int, sinks: int = 0):
        super().__init__(heads, groups, head_dim, width)
        if any(type(each) is not int for each in (segment, window, sinks)) or segment < 2 or window < 1 or sinks < 0:
            raise ValueError(
                f"pooled heads need segments of 2 tokens or more, a window and sinks from 0 on; got {segment}, "
                f"{window}, {sinks}"
            )
        self.segment, self.window, self.sinks = segment, window, sinks

    def sizes(self, count: int) -> dict[str, int]:
        """The length of each tensor of the state."""
        exact, segments, begun = pooled_after(count, self.segment, self.window, self.sinks)
        return {"k": exact, "v": exact, "pooled_k": segments, "pooled_v": segments, "queries": begun}

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> torch.Tensor:
        """The output, block by block of queries."""
        if not state:
            state.update(k=k[:, :, :0], v=v[:, :, :0], pooled_k=k[:, :, :0], pooled_v=q[:, :, :0])
            state.update(queries=q[:, :, :0].float(), count=counted(len(k), 0))
        before = int(state["count"][0])
        count = before + k.shape[2]
        keys, values = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        first = state["pooled_k"].shape[2]
        sums = self._summed(q, state["queries"], before, first)
        segments = self._pooled(count) - first
        pooled_k, pooled_v = self._pool(keys, values, sums, segments)
        pooled_k, pooled_v = torch.cat([state["pooled_k"], pooled_k], 2), torch.cat([state["pooled_v"], pooled_v], 2)
        outputs = [
            self._attend(q[:, :, start : start + self.block], keys, values, pooled_k, pooled_v, before + start, first)
            for start in range(0, q.shape[2], self.block)
        ]
        gone = segments * self.segment
        held = [torch.cat([each[:, :, : self.sinks], each[:, :, self.sinks + gone :]], 2) for each in (keys, values)]
        state.update(k=held[0], v=held[1], pooled_k=pooled_k, pooled_v=pooled_v, queries=sums[:, :, segments:])
        state["count"] = counted(len(k), count)
        return torch.cat(outputs, 2) if outputs else torch.zeros_like(q)

    def _pooled(self, count: int) -> int:
        return pooled_after(count, self.segment, self.window, self.sinks)[1]

    def _summed(self, q: torch.Tensor, sums: torch.Tensor, before: int, first: int) -> torch.Tensor:
        """Sums of queries over segments begun and not pooled, `[batch, query heads, segments, dim]`."""
        start = max(0, self.sinks - before)
        new = q[:, :, start:].float()
        last = before + q.shape[2] - self.sinks
        begun = max(0, -(-last // self.segment) - first)
        total = new.new_zeros(*q.shape[:2], begun, q.shape[3])
        total[:, :, : sums.shape[2]] = sums
        numbers = torch.arange(before + start - self.sinks, max(before + start - self.sinks, last), device=q.device)
        return total.index_add(2, numbers // self.segment - first, new)

    def _pool(
        self, keys: torch.Tensor, values: torch.Tensor, sums: torch.Tensor, segments: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[batch, heads, segments, dim]` and values `[batch, query heads, segments, dim]` of the oldest ones."""
        oldest = slice(self.sinks, self.sinks + segments * self.segment)
        k = keys[:, :, oldest].unflatten(2, (segments, self.segment))
        v = values[:, :, oldest].unflatten(2, (segments, self.segment))
        queries = (sums[:, :, :segments] / self.segment).to(k.dtype).unflatten(1, (k.shape[1], self.groups))
        scores = (k[:, :, None] @ queries[..., None])[..., 0] / math.sqrt(self.head_dim)
        pooled = scores.float().softmax(-1).to(v.dtype)[..., None, :] @ v[:, :, None]
        return k.mean(3), pooled[..., 0, :].flatten(1, 2)

    def _attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pooled_k: torch.Tensor,
        pooled_v: torch.Tensor,
        before: int,
        first: int,
    ) -> torch.Tensor:
        """Queries of the tokens from number `before` on; `keys` lack the `first` segments, which are pooled."""
        time = q.shape[2]
        own = torch.arange(before, before + time, device=q.device)
        pooled = ((own - self.sinks - self.window) // self.segment).clamp_min(0)[:, None]
        held = self._pooled(before + time - 1)
        low = (self._pooled(before) - first) * self.segment
        stop = before + time - first * self.segment
        positions = torch.cat([torch.arange(min(self.sinks, stop)), torch.arange(self.sinks + low, stop)]).to(q.device)
        numbers = torch.where(positions < self.sinks, positions, positions + first * self.segment)
        recent = (numbers >= self.sinks + pooled * self.segment) | (numbers < self.sinks)
        seen = torch.cat([torch.arange(held, device=q.device) < pooled, recent & (numbers <= own[:, None])], 1)
        weights = q.new_zeros(len(numbers) + held)
        weights[:held] = math.log(self.segment)
        mask = weights.expand(time, -1).masked_fill(~seen, -math.inf)
        k = torch.cat([pooled_k[:, :, :held], keys[:, :, positions]], 2)
        if self.groups > 1:
            k, values = k.repeat_interleave(self.groups, 1), values[:, :, positions].repeat_interleave(self.groups, 1)
        else:
            values = values[:, :, positions]
        return masked_attention(q, k, torch.cat([pooled_v[:, :, :held], values], 2), mask, 1)


def pooled_after(count: int, segment: int, window: int, sinks: int = 0) -> tuple[int, int, int]:
    """How many exact tokens, pooled segments, and segments begun but not pooled `Pooled` holds after `count` tokens."""
    pooled = max(0, count - sinks - window) // segment
    return count - segment * pooled, pooled, max(0, -(-max(0, count - sinks) // segment) - pooled)
