"""Mixers of single heads, in flashmorph's own type: adapters of the modules in `flashmorph.own` that attend to rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from flashmorph.mixers.full import FullAttention
from flashmorph.mixers.mixer import LayerArguments
from flashmorph.mixers.own_adapter import OwnAdapter
from flashmorph.mixers.own_states import OwnGatedDeltaNet, OwnLinear, OwnMamba2
from flashmorph.mixers.products import STATE_BYTES, attention_cache_bytes, head_dim_of, number_bytes
from flashmorph.own import VARIANTS, held_after, pooled_after


class OwnFull(FullAttention):
    """The attention of our own type; its class makes masks without documents."""

    def __init__(self) -> None:
        super().__init__(varlen=False)


class OwnWindow(OwnAdapter):
    """A window with sinks."""

    option = "window"
    words = "window"
    sizes = ("window", "sinks")

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": cls.option, "size": given["window"], "sinks": given["sinks"]}

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
        settings = {"kind": cls.option, **VARIANTS[given["dash"]]}
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


def gamma_of_density(mixers: Sequence[Any], density: float) -> float:
    """The gamma at which the mean share of chunks that the layers' samples keep is nearest to `density`: bisection."""
    low, high = 0.0, 64.0
    for _ in range(30):
        gamma = (low + high) / 2
        kept = [mixer.kept_share(*sample, gamma) for mixer in mixers for sample in mixer.samples]
        low, high = (gamma, high) if sum(kept) / len(kept) > density else (low, gamma)
    return (low + high) / 2


OWN_MIXERS: Mapping[str, type[OwnAdapter]] = {
    mixer.option: mixer for mixer in (OwnWindow, OwnLinear, OwnGatedDeltaNet, OwnMamba2, OwnThin, OwnPooled, OwnDash)
}
"""The mixers of our own type by the name that an option has."""
