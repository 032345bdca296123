"""Gated linear attention. This file travels with every checkpoint: it imports torch and transformers only."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .mixer_flashmorph import OwnMixer

DECAYS = ("learned", "fixed", "none")


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
