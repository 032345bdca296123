"""Mamba2 by head. This file travels with every checkpoint: it imports torch and transformers only."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .states_flashmorph import StateMixer, half_lives, of_input


class Mamba2(StateMixer):
    """Mamba2's state space (arXiv 2405.21060, section 7) on the teacher's own queries, keys and values.

        S_t = exp(-a d_t) S_(t-1) + d_t W k_t v_t^T,   output_t = norm(W' q_t S_t + D v_t)

    Its C, B and x are the teacher's queries, keys and values, as in "The Mamba in the Llama" (arXiv 2408.15237). The
    step d is of the layer's input, a and D are numbers for each key-value and each query head, and the norm is RMSNorm
    with a learned scale. The whole layers of `mixers/mamba2.py` have projections, a convolution and an output gate of
    their own instead.

    States are in float32: `head_dim²` numbers for each key-value head, none for query heads.
    """

    def __init__(self, heads: int, groups: int, head_dim: int, width: int):
        super().__init__(heads, groups, head_dim, width, norm=True)
        self.step_weight = nn.Parameter(torch.empty(heads, width))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.rate_log = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads * groups))

    def reset(self) -> None:
        """Identity maps, steps of which a half-life of 64 to 4,096 tokens follows, no skip, scales of 1."""
        super().reset()
        for weight in (self.step_weight, self.rate_log, self.skip):
            init.zeros_(weight)
        init.copy_(self.step_bias, half_lives(self.heads).expm1().log())  # softplus of it is the step

    def run(self, q, k, v, hidden, real, state):  # noqa: D102
        steps = F.softplus(of_input(hidden, self.step_weight, self.step_bias))
        rates = self.rate_log.float().exp()[:, None] * steps
        keys = self.mapped(k, self.key_map) * steps[..., None]
        output = self.read(self.mapped(q, self.query_map), keys, v.float(), rates, real, state)
        skipped = v.float().repeat_interleave(self.groups, 1) * self.skip.float()[:, None, None]
        return self.normed(output + skipped)
