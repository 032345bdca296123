"""Mixers of single heads, in flashmorph's own type: adapters of the modules in `flashmorph.own`.

They work on the queries, keys and values of the attention beside them. Everything that they compute belongs to one
key-value head and its queries, so a plan may take any heads of a branch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from flashmorph.mixers.full import FullAttention
from flashmorph.mixers.mixer import LayerArguments, Products
from flashmorph.mixers.products import (
    STATE_BYTES,
    attention_cache_bytes,
    attention_products,
    head_dim_of,
    number_bytes,
)
from flashmorph.own import VARIANTS, FlashmorphAttention, Linear, OwnMixer, held_after, pooled_after, start


class OwnFull(FullAttention):
    """The attention of our own type; its class makes masks without documents."""

    def __init__(self) -> None:
        super().__init__(varlen=False)


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
        return [*attention_products(config, context, self.held(settings, context)), *_conv_products(config, settings)]

    def held(self, settings: Mapping[str, Any], context: int) -> int:
        """Keys and values, or as many numbers, that one head holds after `context` tokens."""
        return context


class OwnWindow(OwnAdapter):
    """A window with sinks."""

    option = "window"
    words = "window"
    sizes = ("window", "sinks")

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": "window", "size": given["window"], "sinks": given["sinks"]}

    def state_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Keys and values of the window but its newest token, and of the sinks."""
        settings = config.mixer_settings[self.option]
        return attention_cache_bytes(config, min(context, settings["size"] - 1) + settings.get("sinks", 0))

    def held(self, settings: Mapping[str, Any], context: int) -> int:
        """Window and sinks."""
        return settings["size"] + settings.get("sinks", 0)


class OwnThin(OwnAdapter):
    """A weighted sample of the past beside a window; the products of halving are not counted."""

    option = "thin"
    words = "thinned attention"
    sizes = ("window", "sinks", "points")

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {**super().own_settings(given), "schedule": given["schedule"], "halving": given["halving"]}

    def held(self, settings: Mapping[str, Any], context: int) -> int:
        """Exact tokens and the sample."""
        points, window, sinks = settings["points"], settings["window"], settings.get("sinks", 0)
        return sum(held_after(context, points, window, sinks, settings.get("schedule", "reduce")))


class OwnPooled(OwnAdapter):
    """Attention pooled by segment beside a window."""

    option = "pooled"
    words = "attention pooled by segment"
    sizes = ("window", "sinks", "segment")

    def state_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Exact keys and values; of each segment a key, and a value for each query head; sums of queries in float32."""
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
        exact, segments, begun = self._sizes(config.mixer_settings[self.option], context)
        pooled = segments * (kv_heads + heads) * width * number_bytes(config)
        return attention_cache_bytes(config, exact) + pooled + begun * heads * width * STATE_BYTES

    def held(self, settings: Mapping[str, Any], context: int) -> int:
        """Exact tokens and segments."""
        return sum(self._sizes(settings, context)[:2])

    def _sizes(self, settings: Mapping[str, Any], context: int) -> tuple[int, int, int]:
        return pooled_after(context, settings["segment"], settings["window"], settings.get("sinks", 0))


class OwnDash(OwnAdapter):
    """Attention to the chunks that a query routes to: it saves reading, and no memory.

    Products are those of full attention: how much a query reads depends on the text. PyTorch computes all scores of a
    prompt and masks those of other chunks; a single query reads its chunks only.
    """

    option = "dash"
    words = "attention to routed chunks (saves reading, no memory)"
    sizes = ("chunk",)
    own_weights = True

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        settings = {"kind": "dash", **VARIANTS[given["dash"]]}
        if given["chunk"]:
            settings["chunk"] = given["chunk"]
        return settings | ({"density": given["density"]} if given["density"] else {})

    def initialise(self, module: Any, attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        """Keep queries and keys of the layer, where gamma has to be chosen for all layers together."""
        if module.mixer.density is not None:
            hook = module.mixer.register_forward_pre_hook(lambda mixer, inputs: mixer.sample(*inputs[:2]))
            module(hidden, **arguments)
            hook.remove()

    def settle(self, modules: Sequence[Any]) -> None:
        """One gamma for all layers, so that the mean share of chunks that are kept is the density asked for."""
        mixers = [module.mixer for module in modules if module.mixer.density is not None]
        if mixers:
            gamma = gamma_of_density(mixers, mixers[0].density)
            for mixer in mixers:
                mixer.gamma.fill_(gamma)
                mixer.samples = []

    def state_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """All keys and values, and a summary for each finished chunk."""
        finished = context // config.mixer_settings[self.option]["chunk"]
        summaries = finished * config.num_key_value_heads * head_dim_of(config) * number_bytes(config)
        return attention_cache_bytes(config, context) + summaries


class OwnLinear(OwnAdapter):
    """Gated linear attention with a learned feature map."""

    option = "linear"
    words = "gated linear attention"
    own_weights = True

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
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

    def state_bytes(self, config: PreTrainedConfig, context: int) -> int:
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
            *_conv_products(config, config.mixer_settings[self.option]),
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


def gamma_of_density(mixers: Sequence[Any], density: float) -> float:
    """The gamma at which the mean share of chunks that the layers' samples keep is nearest to `density`: bisection."""
    low, high = 0.0, 64.0
    for _ in range(30):
        gamma = (low + high) / 2
        kept = [mixer.kept_share(*sample, gamma) for mixer in mixers for sample in mixer.samples]
        low, high = (gamma, high) if sum(kept) / len(kept) > density else (low, gamma)
    return (low + high) / 2


def _channels(config: PreTrainedConfig) -> int:
    """Numbers that a convolution has for each token: queries, keys and values."""
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim_of(config)


def _conv_products(config: PreTrainedConfig, settings: Mapping[str, Any]) -> list[Products]:
    conv = settings.get("conv")
    if not conv or not conv["rank"]:
        return []
    into = 2 * config.hidden_size * config.num_key_value_heads * conv["rank"]
    taps = 2 * _channels(config) * conv["taps"] * conv["rank"]
    return [
        Products("into the taps", "input", "2 · hidden · kv_heads · rank", into),
        Products("taps", "weights", "2 · channels · taps · rank", taps),
    ]


OWN_MIXERS: Mapping[str, type[OwnAdapter]] = {
    "window": OwnWindow,
    "linear": OwnLinear,
    "thin": OwnThin,
    "pooled": OwnPooled,
    "dash": OwnDash,
}
"""The mixers of our own type by the name that an option has."""
