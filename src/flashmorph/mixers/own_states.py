"""Mixers of single heads that keep a matrix for each key-value head: adapters of `own/states_flashmorph.py`."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from flashmorph.mixers.mixer import LayerArguments, Products
from flashmorph.mixers.own_adapter import OwnAdapter, conv_products
from flashmorph.mixers.products import STATE_BYTES, attention_products, head_dim_of
from flashmorph.own import StateMixer


class OwnStates(OwnAdapter):
    """What they have in common: maps of queries and keys, and a state `[features, values]` for each key-value head.

    `doubled`: there are two features for each number of a head. `counts`: the state has a sum of keys beside the
    values. `delta`: what is written is what the delta rule leaves of a value.
    """

    own_weights = True
    doubled = True
    counts = False
    delta = False

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
        """Sums of products of keys and values, in float32."""
        features, values = self._shape(config)
        return config.num_key_value_heads * features * values * STATE_BYTES

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """Projections, maps, and chunks of scores and states."""
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
        into, _, out = attention_products(config, context)
        features, values = self._shape(config)
        maps = 2 * (heads + kv_heads) * head_dim * head_dim
        chunk = min(StateMixer.chunk, context)
        scores = 2 * chunk * heads * (features + values)
        states = 2 * (heads + kv_heads) * features * values
        return [
            into,
            Products("maps", "weights", "2 · (heads + kv_heads) · head_dim²", maps),
            Products("scores, values", "state", "2 · chunk · heads · (features + values)", scores, 0.5),
            Products("states", "state", "2 · (heads + kv_heads) · features · values", states, step=states),
            *(self._delta_products(kv_heads, features, values, chunk) if self.delta else ()),
            out,
            *conv_products(config, config.mixer_settings[self.option]),
        ]

    def _shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Features and values of a state."""
        head_dim = head_dim_of(config)
        return head_dim * (2 if self.doubled else 1), head_dim + (1 if self.counts else 0)

    @staticmethod
    def _delta_products(kv_heads: int, features: int, values: int, chunk: int) -> list[Products]:
        """What the state has at a key, and the products of keys; the triangular system is not counted."""
        read, keys = 2 * kv_heads * features * values, 2 * chunk * kv_heads * features
        return [
            Products("values at keys", "state", "2 · kv_heads · features · values", read, step=read),
            Products("keys at keys", "state", "2 · chunk · kv_heads · features", keys, 0.5),
        ]


class OwnLinear(OwnStates):
    """Gated linear attention with a learned feature map."""

    option = "linear"
    words = "gated linear attention"
    counts = True

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": cls.option, "decay": given["decay"], "norm": given["head_norm"]}


class OwnGatedDeltaNet(OwnStates):
    """The gated delta rule on the teacher's queries, keys and values."""

    option = "gated_delta_net"
    words = "Gated DeltaNet"
    delta = True

    @classmethod
    def own_settings(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry in `mixer_settings`, from the host's settings."""
        return {"kind": cls.option, "norm": given["head_norm"]}


class OwnMamba2(OwnStates):
    """Mamba2's state space on the teacher's queries, keys and values."""

    option = "mamba2"
    words = "Mamba2"
    doubled = False
