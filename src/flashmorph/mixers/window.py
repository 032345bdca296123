"""A sliding window: the same attention, its scores limited to the newest tokens."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from flashmorph.mixers.full import FullAttention
from flashmorph.mixers.mixer import Products
from flashmorph.mixers.products import attention_cache_bytes, attention_products
from flashmorph.own import CACHE


class SlidingWindow(FullAttention):
    """Attention to `sliding_window` tokens of the configuration, the token itself included."""

    borrows = True

    def __init__(self) -> None:
        super().__init__("sliding window")

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """The attention itself, looking through the window."""
        return _Window(attention)

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Keys and values of all but one of the window's tokens: the newest is in the forward that reads them."""
        return attention_cache_bytes(config, min(context, config.sliding_window - 1))

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """As of attention, the scores over the window."""
        return attention_products(config, context, config.sliding_window)


class _Window(nn.Module):
    """An attention that sees its window only; its weights stay the attention's own."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        # In a list, so that the weights are not registered here a second time.
        self._attention = [attention]

    @property
    def o_proj(self) -> nn.Module:
        """The attention's output projection."""
        return cast(Any, self._attention[0]).o_proj

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        attention = cast(Any, self._attention[0])
        no_cache: dict[str, Any] = {CACHE: None}
        mask = create_sliding_window_causal_mask(
            config=attention.config,
            inputs_embeds=hidden_states,
            attention_mask=None,
            position_ids=arguments.get("position_ids"),
            **no_cache,
        )
        # Flash attention reads the window from the module, not from the mask.
        attention.sliding_window = attention.config.sliding_window
        try:
            return attention(hidden_states=hidden_states, **{**arguments, "attention_mask": mask})
        finally:
            attention.sliding_window = None
