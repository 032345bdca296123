"""Gated DeltaNet by head. This file travels with every checkpoint: it imports torch and transformers only."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .states_flashmorph import StateMixer, half_lives, of_input, softmax_features


class GatedDeltaNet(StateMixer):
    """The gated delta rule (arXiv 2412.06464) on the teacher's own queries, keys and values.

        S_t = g_t S_(t-1) + b_t k_t (v_t - g_t S_(t-1)^T k_t)^T,   output_t = s q_t S_t

    q and k are the feature map of `Linear` at length 1, so that what a key has written is read back by a query like it.
    Decay g and strength b are of the layer's input, and s is a scale for each query head. What S has at a key is close
    to the mean of the values that were written there, so nothing is divided by a sum of weights. The whole layers of
    `mixers/gated_delta_net.py` have projections, a convolution and an output gate of their own instead.

    States are in float32: `2 · head_dim²` numbers for each key-value head, none for query heads.
    """

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, norm: bool = False):
        super().__init__(heads, groups, head_dim, width, norm)
        if not isinstance(norm, bool):
            raise ValueError(f"heads with the delta rule have a norm or none; got {norm}")
        if not norm:
            self.scale = nn.Parameter(torch.empty(heads * groups))
        self.decay_weight = nn.Parameter(torch.empty(heads, width))
        self.decay_bias = nn.Parameter(torch.empty(heads))
        self.strength_weight = nn.Parameter(torch.empty(heads, width))
        self.strength_bias = nn.Parameter(torch.empty(heads))

    def reset(self) -> None:
        """Identity maps, a half-life of 64 to 4,096 tokens, strengths of 1/2, scales of 1."""
        super().reset()
        for weight in (self.decay_weight, self.strength_weight, self.strength_bias):
            init.zeros_(weight)
        init.copy_(self.decay_bias, half_lives(self.heads).expm1().log())  # softplus of it is the rate
        init.ones_(self.scale)

    def run(self, q, k, v, hidden, real, state):  # noqa: D102
        queries = F.normalize(softmax_features(self.mapped(q, self.query_map)), dim=-1)
        keys = F.normalize(softmax_features(self.mapped(k, self.key_map)), dim=-1)
        rates = F.softplus(of_input(hidden, self.decay_weight, self.decay_bias))
        strengths = of_input(hidden, self.strength_weight, self.strength_bias).sigmoid()
        output = self.read(queries, keys, v.float(), rates, real, state, strengths)
        return self.normed(output) if self.norm else output * self.scale.float()[:, None, None]
