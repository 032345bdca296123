"""Mixers of single heads, in flashmorph's own type: adapters of the modules in `flashmorph.own`.

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
from flashmorph.mixers.products import STATE_BYTES, attention_cache_bytes, attention_products, head_dim_of
from flashmorph.own import FlashmorphAttention, Linear, OwnMixer, held_after


class OwnFull(FullAttention):
    """The attention of our own type; its class makes masks without documents."""

    def __init__(self) -> None:
        super().__init__(varlen=False)


class _OwnAdapter(FullAttention):
    """What the mixers here have in common: `option` is their name in the configuration."""

    option: str
    borrows = True

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """The mixer of all heads of the layer, beside the attention whose projections it uses."""
        mixer = cast(FlashmorphAttention, attention).new_mixer(self.option, config.num_key_value_heads)
        mixer.reset()
        return _Beside(self.option, mixer, attention)

    def run(self, module: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """The output, given everything that the decoder layer passes."""
        return module(hidden, **arguments)

    def supports_varlen(self, device: torch.device) -> bool:
        """No mixer here knows of documents: rows are cut at their boundaries."""
        return False


class OwnWindow(_OwnAdapter):
    """A window with sinks."""

    option = "window"

    def __init__(self) -> None:
        super().__init__("window by head", varlen=False)

    @staticmethod
    def own_settings(given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": "window", "size": given["window"], "sinks": given["sinks"]}

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Keys and values of the window but its newest token, and of the sinks."""
        settings = config.mixer_settings[self.option]
        return attention_cache_bytes(config, min(context, settings["size"] - 1) + settings.get("sinks", 0))

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """As of attention, the scores over window and sinks."""
        settings = config.mixer_settings[self.option]
        return attention_products(config, context, settings["size"] + settings.get("sinks", 0))


class OwnThin(_OwnAdapter):
    """A weighted sample of the past beside a window."""

    option = "thin"

    def __init__(self) -> None:
        super().__init__("thinned attention by head", varlen=False)

    @staticmethod
    def own_settings(given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": "thin"} | {name: given[name] for name in ("points", "window", "sinks")}

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Keys and values of the exact tokens and of the sample."""
        return attention_cache_bytes(config, self._held(config, context))

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """As of attention to as many tokens as are held at the end; the halvings are not counted."""
        return attention_products(config, context, self._held(config, context))

    def _held(self, config: PreTrainedConfig, context: int) -> int:
        settings = config.mixer_settings[self.option]
        return sum(held_after(context, settings["points"], settings["window"], settings.get("sinks", 0)))


class OwnLinear(_OwnAdapter):
    """Gated linear attention with a learned feature map."""

    option = "linear"
    trainable = True

    def __init__(self) -> None:
        super().__init__("gated linear attention by head", varlen=False)

    @staticmethod
    def own_settings(given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": "linear", "decay": given["decay"], "norm": given["head_norm"]}

    def initialise(self, module: Any, attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        """The scales of normalised heads start as the mean size of the attention's own heads."""
        mixer = module.mixer
        if not mixer.norm:
            return
        projection = attention.o_proj
        heads: list[torch.Tensor] = []
        hook = projection.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
        try:
            attention(hidden_states=hidden, **arguments)
        finally:
            hook.remove()
        sizes = heads[0].float().unflatten(-1, (len(mixer.scale), -1)).square().mean((0, 1, 3)).sqrt()
        mixer.scale.data.copy_(sizes)

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Sums of products of keys and values, and of keys, in float32."""
        head_dim = head_dim_of(config)
        return config.num_key_value_heads * 2 * head_dim * (head_dim + 1) * STATE_BYTES

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """Projections, feature maps, and chunks of scores and states."""
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
        into, _, out = attention_products(config, context)
        features, values = 2 * head_dim, head_dim + 1
        maps = 2 * (heads + kv_heads) * head_dim * head_dim
        chunk = min(Linear.chunk, context)
        scores = 2 * chunk * heads * (features + values)
        states = 2 * (heads + kv_heads) * features * values
        return [
            into,
            Products("feature maps", "weights", "2 · (heads + kv_heads) · head_dim²", maps),
            Products("scores, values", "state", "2 · chunk · heads · (3 · head_dim + 1)", scores, 0.5),
            Products("states", "state", "4 · (heads + kv_heads) · head_dim · (head_dim + 1)", states, step=states),
            out,
        ]


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


OWN_MIXERS: Mapping[str, Any] = {"window": OwnWindow, "linear": OwnLinear, "thin": OwnThin}
"""The mixers of our own type by the name that an option has."""
