"""What the mixers of single heads, in flashmorph's own type, have in common as options of a host.

They work on the queries, keys and values of the attention beside them. Everything that they compute belongs to one
key-value head and its queries, so a plan may take any heads of a branch.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from flashmorph.mixers.full import FullAttention
from flashmorph.mixers.mixer import LayerArguments, Products
from flashmorph.mixers.products import attention_cache_bytes, attention_products, head_dim_of, number_bytes
from flashmorph.own import FlashmorphAttention, OwnMixer, start


class OwnAdapter(FullAttention):
    """What the mixers here have in common.

    `option` is their name in the configuration, and their kind; `words` describes them. `sizes` are settings of the
    host that a mixer takes as they are, and whose sum is the longest text that it sees as full attention does. With a
    convolution before it (`convolved`) every mixer has weights of its own.
    """

    option: str
    words: str
    sizes: tuple[str, ...] = ()
    own_weights = False
    borrows = True

    def __init__(self, convolved: bool = False) -> None:
        super().__init__(f"{self.words} by head" + (", after a convolution" if convolved else ""), varlen=False)
        self.trainable = self.own_weights or convolved

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": cls.option, **{name: given[name] for name in cls.sizes}}

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """The mixer of all heads of the layer, beside the attention whose projections it uses."""
        mixer = cast(FlashmorphAttention, attention).new_mixer(self.option, config.num_key_value_heads)
        start(mixer)
        return _Beside(self.option, mixer, attention)

    def run(self, module: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """The output, given everything that the decoder layer passes."""
        return module(hidden, **arguments)

    def supports_varlen(self, device: torch.device) -> bool:
        """No mixer here knows of documents: rows are cut at their boundaries."""
        return False

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """The mixer's own state, and the rows that a convolution keeps."""
        conv = config.mixer_settings[self.option].get("conv")
        rows = (conv["taps"] - 1) * _channels(config) * number_bytes(config) if conv else 0
        return self.state_bytes(config, context) + rows

    def state_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Bytes of the state that the mixer itself keeps of one sequence of `context` tokens."""
        return attention_cache_bytes(config, self.held(config.mixer_settings[self.option], context))

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """As of attention to as many tokens as are held at the end, and of a convolution the making of its taps."""
        settings = config.mixer_settings[self.option]
        return [*attention_products(config, context, self.held(settings, context)), *conv_products(config, settings)]

    def held(self, settings: Mapping[str, Any], context: int) -> int:
        """Keys and values, or as many numbers, that one head holds after `context` tokens."""
        return context


class _Beside(nn.Module):
    """A mixer of all heads of a layer on the projections of the attention, which stay the attention's own."""

    def __init__(self, option: str, mixer: OwnMixer, attention: nn.Module):
        super().__init__()
        self.mixer, self._option = mixer, option
        # In a list, so that the weights are not registered here a second time.
        self._attention = [attention]

    @property
    def o_proj(self) -> nn.Module:
        """The attention's output projection."""
        return cast(Any, self._attention[0]).o_proj

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        attention = cast(FlashmorphAttention, self._attention[0])
        heads = range(attention.k_proj.out_features // attention.head_dim)
        return attention.mix({self._option: (heads, self.mixer)}, hidden_states, **arguments)


def _channels(config: PreTrainedConfig) -> int:
    """Numbers that a convolution has for each token: queries, keys and values."""
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim_of(config)


def conv_products(config: PreTrainedConfig, settings: Mapping[str, Any]) -> list[Products]:
    """The making of a convolution's taps, if a mixer with these settings has one before it."""
    conv = settings.get("conv")
    if not conv or not conv["rank"]:
        return []
    into = 2 * config.hidden_size * config.num_key_value_heads * conv["rank"]
    taps = 2 * _channels(config) * conv["taps"] * conv["rank"]
    return [
        Products("into the taps", "input", "2 · hidden · kv_heads · rank", into),
        Products("taps", "weights", "2 · channels · taps · rank", taps),
    ]
