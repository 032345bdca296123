"""A sliding window with sinks. This file travels with every checkpoint: it imports torch and transformers only."""

import torch

from .mixer_flashmorph import OwnMixer, State, masked_attention


class Window(OwnMixer):
    """Attention to the newest `size` tokens, the token itself included, and to the first `sinks` tokens of the text.

    Sinks: StreamingLLM (arXiv 2309.17453). The state has `2 · (size - 1 + sinks)` vectors of a head at most.
    """

    block = 256

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, size: int, sinks: int = 0):
        super().__init__(heads, groups, head_dim, width)
        if type(size) is not int or type(sinks) is not int or size < 2 or sinks < 0:
            raise ValueError(f"a window needs a size of at least 2 and no fewer than 0 sinks; got {size} and {sinks}")
        self.size, self.sinks = size, sinks

    def forward(self, q, k, v, hidden, real, state):  # noqa: D102
        batch, _, time, _ = k.shape
        if real is None:
            real = torch.ones(batch, time, dtype=torch.bool, device=k.device)
        real = real.bool()
        before = self._start(k, real) if not state else state
        # The number of real tokens up to each one, from 0.
        order = before["count"][:, None] + real.cumsum(1) - 1
        sinks = {name: before[f"first_{name}"] for name in ("k", "v")}
        if self.sinks:
            slots = torch.arange(self.sinks, device=k.device)[:, None]
            taken = ((order[:, None] == slots) & real[:, None]).to(k.dtype)
            sinks = {"k": sinks["k"] + taken[:, None] @ k, "v": sinks["v"] + taken[:, None] @ v}
        keys, values = torch.cat([before["k"], k], 2), torch.cat([before["v"], v], 2)
        seen = torch.cat([before["real"], real], 1)
        output = self._attend(q, keys, values, sinks, order, seen)
        if state is not None:
            kept = max(0, keys.shape[2] - (self.size - 1))
            state.update(
                k=keys[:, :, kept:].clone(),
                v=values[:, :, kept:].clone(),
                real=seen[:, kept:].clone(),
                first_k=sinks["k"],
                first_v=sinks["v"],
                count=before["count"] + real.sum(1),
            )
        return output

    def _start(self, k: torch.Tensor, real: torch.Tensor) -> State:
        batch, heads, _, head_dim = k.shape
        none, first = k.new_empty(batch, heads, 0, head_dim), k.new_zeros(batch, heads, self.sinks, head_dim)
        count = torch.zeros(batch, dtype=torch.long, device=k.device)
        return {"k": none, "v": none, "real": real[:, :0], "first_k": first, "first_v": first, "count": count}

    def _attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: State,
        order: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """Block by block of queries, each with the keys that its windows reach."""
        time = q.shape[2]
        offset = keys.shape[2] - time
        positions = torch.arange(keys.shape[2], device=q.device)
        numbers = torch.arange(self.sinks, device=q.device)
        outputs = []
        for start in range(0, time, self.block):
            stop = min(start + self.block, time)
            low = max(0, offset + start - self.size + 1)
            near, own = positions[low : offset + stop], positions[offset + start : offset + stop, None]
            back = own - near
            mask = (back >= 0) & (back < self.size) & seen[:, None, low : offset + stop]
            # A token of the padding sees itself, so that no row of scores is empty.
            mask = mask | (back == 0)
            far = order[:, start:stop, None] - numbers >= self.size
            k = torch.cat([sinks["k"], keys[:, :, low : offset + stop]], 2)
            v = torch.cat([sinks["v"], values[:, :, low : offset + stop]], 2)
            mask = torch.cat([far, mask], 2)[:, None]
            outputs.append(masked_attention(q[:, :, start:stop], k, v, mask, self.groups))
        return torch.cat(outputs, 2)
