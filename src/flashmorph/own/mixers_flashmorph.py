"""Mixers that key-value heads can have in place of full attention.

A mixer works on the queries, keys and values of the teacher's own projections, so a switched head needs few weights of
its own or none. This file travels with every checkpoint: it imports torch and transformers only.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

State = dict[str, torch.Tensor]
DECAYS = ("learned", "fixed", "none")


class OwnMixer(nn.Module):
    """A mixer of some key-value heads of one layer.

    The rows of its weights belong to one head each, head after head, so that they can be gathered by head. `rotary`:
    whether it wants queries and keys after RoPE.
    """

    rotary = True

    def __init__(self, heads: int, groups: int, head_dim: int, width: int):
        super().__init__()
        self.heads, self.groups, self.head_dim, self.width = heads, groups, head_dim, width

    def reset(self) -> None:
        """Set its own weights to their start."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor,
        real: torch.Tensor | None,
        state: State | None,
    ) -> torch.Tensor:
        """The heads' output `[batch, heads · groups, time, head_dim]`.

        Args:
            q: `[batch, heads · groups, time, head_dim]`, the query heads of a key-value head together.
            k: `[batch, heads, time, head_dim]`, as `v`.
            v: See `k`.
            hidden: The layer's input `[batch, time, width]`.
            real: Which tokens are none of the padding, `[batch, time]`; None: all.
            state: Of the tokens before, empty at the beginning, and updated in place; None: there is no cache.
        """
        raise NotImplementedError


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
            places = torch.arange(self.sinks, device=k.device)[:, None]
            taken = ((order[:, None] == places) & real[:, None]).to(k.dtype)
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
        places = torch.arange(keys.shape[2], device=q.device)
        numbers = torch.arange(self.sinks, device=q.device)
        outputs = []
        for start in range(0, time, self.block):
            stop = min(start + self.block, time)
            low = max(0, offset + start - self.size + 1)
            near, own = places[low : offset + stop], places[offset + start : offset + stop, None]
            back = own - near
            mask = (back >= 0) & (back < self.size) & seen[:, None, low : offset + stop]
            # A token of the padding sees itself, so that no row of scores is empty.
            mask = mask | (back == 0)
            far = order[:, start:stop, None] - numbers >= self.size
            k = torch.cat([sinks["k"], keys[:, :, low : offset + stop]], 2)
            v = torch.cat([sinks["v"], values[:, :, low : offset + stop]], 2)
            mask = torch.cat([far, mask], 2)[:, None]
            outputs.append(_attention(q[:, :, start:stop], k, v, mask, self.groups))
        return torch.cat(outputs, 2)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Linear(OwnMixer):
    """Gated linear attention on the teacher's own queries, keys and values.

        S_t = g_t S_(t-1) + f(k_t) v_t^T,   n_t = g_t n_(t-1) + f(k_t),   output_t = f(q_t) S_t / (f(q_t) · n_t)

    with the feature map f(x) = softmax([W x, -W x]) of Hedgehog (arXiv 2402.04347), one W for each query head and one
    for each key-value head. The decay g_t is `learned`, of the layer's input (gated linear attention,
    arXiv 2312.06635), `fixed`, slopes by head (lightning attention, arXiv 2401.04658), or `none`. With `norm` the
    output of each head has an RMSNorm and a learned scale (HydraHead, arXiv 2606.20097, equations 13 and 14).

    States are in float32: `2 · head_dim · (head_dim + 1)` numbers for each key-value head, none for query heads.
    """

    chunk = 64
    slope: torch.Tensor

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, decay: str = "learned", norm: bool = False):
        super().__init__(heads, groups, head_dim, width)
        if decay not in DECAYS or not isinstance(norm, bool):
            raise ValueError(
                f"linear heads have a decay, {' or '.join(DECAYS)}, and a norm or none; got {decay}, {norm}"
            )
        self.decay, self.norm = decay, norm
        self.query_map = nn.Parameter(torch.empty(heads * groups * head_dim, head_dim))
        self.key_map = nn.Parameter(torch.empty(heads * head_dim, head_dim))
        if decay == "learned":
            self.decay_weight = nn.Parameter(torch.empty(heads, width))
            self.decay_bias = nn.Parameter(torch.empty(heads))
        elif decay == "fixed":
            # A buffer that is stored: heads keep their own when a plan takes some of them.
            self.register_buffer("slope", torch.empty(heads))
        if norm:
            self.scale = nn.Parameter(torch.empty(heads * groups))

    def reset(self) -> None:
        """Identity maps scaled to the softmax's, a half-life of 64 to 4,096 tokens, scales of 1."""
        eye = torch.eye(self.head_dim) / math.sqrt(math.sqrt(self.head_dim))
        for weight in (self.query_map, self.key_map):
            init.copy_(weight, eye.repeat(len(weight) // self.head_dim, 1))
        spread = torch.linspace(6, 12, self.heads) if self.heads > 1 else torch.tensor([9.0])
        rate = math.log(2) / 2**spread
        if self.decay == "learned":
            init.zeros_(self.decay_weight)
            init.copy_(self.decay_bias, rate.expm1().log())  # softplus of it is the rate
        elif self.decay == "fixed":
            init.copy_(self.slope, rate)
        if self.norm:
            init.ones_(self.scale)

    def forward(self, q, k, v, hidden, real, state):  # noqa: D102
        queries = self._features(q, self.query_map)
        keys = self._features(k, self.key_map)
        values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
        rates = self._rates(hidden)
        if real is not None:
            keys, rates = keys * real[:, None, :, None], rates * real[:, None]
        past = state.get("sum") if state else None
        output, last = chunked(queries, keys, values, rates, past, self.groups, self.chunk)
        if state is not None:
            state["sum"] = last
        output = output[..., :-1] / output[..., -1:].clamp_min(1e-6)
        if self.norm:
            output = F.rms_norm(output, (self.head_dim,), eps=1e-6) * self.scale.float()[:, None, None]
        return output.to(v.dtype)

    def _features(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        projected = x.float() @ weight.float().unflatten(0, (-1, self.head_dim)).mT
        return torch.cat([projected, -projected], -1).softmax(-1)

    def _rates(self, hidden: torch.Tensor) -> torch.Tensor:
        """-log of the decay, `[batch, heads, time]`."""
        if self.decay == "learned":
            return F.softplus(F.linear(hidden.float(), self.decay_weight.float(), self.decay_bias.float())).mT
        batch, time, _ = hidden.shape
        if self.decay == "fixed":
            return self.slope.float()[None, :, None].expand(batch, -1, time)
        return torch.zeros(batch, self.heads, time, device=hidden.device)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rates: torch.Tensor,
    past: torch.Tensor | None,
    groups: int,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q_t S_t` with `S_t = exp(-rate_t) S_(t-1) + k_t v_t^T`, chunk by chunk, and the last S.

    `q` is `[batch, heads · groups, time, features]`, `k` `[batch, heads, time, features]`, `v` `[batch, heads, time,
    values]`, `rates` `[batch, heads, time]`, not negative, and S, as `past`, `[batch, heads, features, values]`.
    """
    batch, heads, time, features = k.shape
    q = q.unflatten(1, (heads, groups))
    total = past if past is not None else k.new_zeros(batch, heads, features, v.shape[-1])
    outputs = []
    for start in range(0, time, chunk):
        part = slice(start, min(start + chunk, time))
        q_, k_, v_ = q[:, :, :, part], k[:, :, part], v[:, :, part]
        fallen = rates[:, :, part].cumsum(-1)
        between = fallen[..., :, None] - fallen[..., None, :]
        # Above the diagonal the exponent would be positive, and may be too large before it is masked.
        weights = torch.exp(-between.masked_fill(_above(between), math.inf))
        scores = q_ @ k_[:, :, None].mT * weights[:, :, None]
        earlier = (q_ * torch.exp(-fallen)[:, :, None, :, None]) @ total[:, :, None]
        outputs.append(scores @ v_[:, :, None] + earlier)
        left = torch.exp(fallen - fallen[..., -1:])
        total = total * torch.exp(-fallen[..., -1])[..., None, None] + (k_ * left[..., None]).mT @ v_
    return torch.cat(outputs, 3).flatten(1, 2), total


def _above(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


MIXERS: dict[str, type[OwnMixer]] = {"window": Window, "linear": Linear}
"""The class of each kind of mixer, as `mixer_settings` names it."""


def make_mixer(settings: dict[str, Any], heads: int, groups: int, head_dim: int, width: int) -> OwnMixer:
    """A mixer of `heads` key-value heads from its entry in `mixer_settings`.

    Raises:
        ValueError: there is no such kind.
    """
    own = dict(settings)
    kind = own.pop("kind", None)
    if kind not in MIXERS:
        raise ValueError(f"there is no mixer of kind {kind!r}; there are {', '.join(MIXERS)}")
    return MIXERS[kind](heads, groups, head_dim, width, **own)
