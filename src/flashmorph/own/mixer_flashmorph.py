"""What the mixers of single heads have in common.

A mixer works on the queries, keys and values of the teacher's own projections, so a switched head needs few weights of
its own or none. This file travels with every checkpoint: it imports torch and transformers only.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

State = dict[str, torch.Tensor]
"""What a mixer keeps of the tokens before: tensors whose first dimension is the batch."""


class Starts(nn.Module):
    """A module with weights of its own that a checkpoint may not have."""

    def reset(self) -> None:
        """Set its own weights to their start."""


class OwnMixer(Starts, ABC):
    """A mixer of some key-value heads of one layer.

    The rows of its weights belong to one head each, head after head, so that they can be gathered by head. `rotary`:
    whether it wants queries and keys after RoPE. `key_bias`: whether keys have the bias of their projection, which a
    softmax cancels nearly, and a sum of products does not. `conv`, where there is one, changes queries, keys and values
    before RoPE.
    """

    rotary = True
    key_bias = True

    def __init__(self, heads: int, groups: int, head_dim: int, width: int):
        super().__init__()
        self.heads, self.groups, self.head_dim, self.width = heads, groups, head_dim, width
        self.conv: Any = None

    @abstractmethod
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
        ...


def start(mixer: nn.Module) -> None:
    """Set all weights of a mixer, and of a convolution before it, to their start."""
    for module in mixer.modules():
        if isinstance(module, Starts):
            module.reset()


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, groups: int
) -> torch.Tensor:
    """Attention of queries `[batch, heads · groups, ...]` to `heads` keys and values under a mask."""
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
