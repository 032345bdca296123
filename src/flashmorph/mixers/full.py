"""Full attention: the teacher's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from flashmorph.mixers.mixer import Kernels, LayerArguments, Products
from flashmorph.mixers.products import attention_cache_bytes, attention_products


class FullAttention:
    """The attention of a host's decoder layer. `gated` has a gate row for each query row.

    `varlen`: its class goes by `position_ids` where rows hold several documents, in its mask or in variable-length
    flash attention.
    """

    trainable = False
    borrows = False
    separable_by_head = True
    projection = "o_proj"
    kernels: Kernels | None = None

    def __init__(self, name: str = "attention", gated: bool = False, varlen: bool = True):
        self.name, self._gated, self._varlen = name, gated, varlen

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """The attention itself."""
        return attention

    def initialise(self, module: Any, attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        """Nothing to start: its weights are the teacher's."""

    def settle(self, modules: Sequence[Any]) -> None:
        """Nothing that all layers share has to be chosen."""

    def run(self, module: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """The output, given everything that the decoder layer passes."""
        return module(hidden_states=hidden, **arguments)[0]

    def supports_varlen(self, device: torch.device) -> bool:
        """On CUDA: on a CPU masks as large as the row would be slower than single documents."""
        return self._varlen and device.type == "cuda"

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Keys and values."""
        return attention_cache_bytes(config, context)

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """Projections, scores and their weighted sum."""
        return attention_products(config, context, gated=self._gated)
