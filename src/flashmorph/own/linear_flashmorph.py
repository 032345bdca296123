"""Gated linear attention. This file travels with every checkpoint: it imports torch and transformers only."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .states_flashmorph import StateMixer, half_lives, of_input, softmax_features

DECAYS = ("learned", "fixed", "none")


class Linear(StateMixer):
    """Gated linear attention on the teacher's own queries, keys and values.

        S_t = g_t S_(t-1) + f(k_t) v_t^T,   n_t = g_t n_(t-1) + f(k_t),   output_t = f(q_t) S_t / (f(q_t) · n_t)

    with the feature map f(x) = softmax([W x, -W x]) of Hedgehog (arXiv 2402.04347), one W for each query head and one
    for each key-value head. The decay g_t is `learned`, of the layer's input (gated linear attention,
    arXiv 2312.06635), `fixed`, slopes by head (lightning attention, arXiv 2401.04658), or `none`. With `norm` the
    output of each head has an RMSNorm and a learned scale (HydraHead, arXiv 2606.20097, equations 13 and 14).

    States are in float32: `2 · head_dim · (head_dim + 1)` numbers for each key-value head, none for query heads.
    """

    slope: torch.Tensor

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, decay: str = "learned", norm: bool = False):
        super().__init__(heads, groups, head_dim, width, norm)
        if decay not in DECAYS or not isinstance(norm, bool):
            raise ValueError(
                f"linear heads have a decay, {' or '.join(DECAYS)}, and a norm or none; got {decay}, {norm}"
            )
        self.decay = decay
        if decay == "learned":
            self.decay_weight = nn.Parameter(torch.empty(heads, width))
            self.decay_bias = nn.Parameter(torch.empty(heads))
        elif decay == "fixed":
            # A buffer that is stored: heads keep their own when a plan takes some of them.
            self.register_buffer("slope", torch.empty(heads))

    def reset(self) -> None:
        """Identity maps scaled to the softmax's, a half-life of 64 to 4,096 tokens, scales of 1."""
        super().reset()
        rate = half_lives(self.heads)
        if self.decay == "learned":
            init.zeros_(self.decay_weight)
            init.copy_(self.decay_bias, rate.expm1().log())  # softplus of it is the rate
        elif self.decay == "fixed":
            init.copy_(self.slope, rate)

    def run(self, q, k, v, hidden, real, state):  # noqa: D102
        queries = softmax_features(self.mapped(q, self.query_map))
        keys = softmax_features(self.mapped(k, self.key_map))
        values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
        output = self.read(queries, keys, values, self._rates(hidden), real, state)
        return self.normed(output[..., :-1] / output[..., -1:].clamp_min(1e-6))

    def _rates(self, hidden: torch.Tensor) -> torch.Tensor:
        """-log of the decay, `[batch, heads, time]`."""
        if self.decay == "learned":
            return F.softplus(of_input(hidden, self.decay_weight, self.decay_bias))
        batch, time, _ = hidden.shape
        if self.decay == "fixed":
            return self.slope.float()[None, :, None].expand(batch, -1, time)
        return torch.zeros(batch, self.heads, time, device=hidden.device)
