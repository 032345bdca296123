"""A Llama- or Qwen3-shaped causal language model whose key-value heads have different mixers.

With every head full it computes what the teacher's own class computes. This file travels with every checkpoint: it
imports torch and transformers only.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .cache_flashmorph import own_layers
from .configuration_flashmorph import FULL, FlashmorphConfig
from .mixer_flashmorph import OwnMixer, Starts
from .mixers_flashmorph import make_mixer

Mixing = Mapping[str, tuple[Sequence[int], OwnMixer | None]]
"""For each mixer its key-value heads and its module; none for full attention."""
CACHE = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"
"""The argument of that name in the installed transformers: `cache` since 5.24."""


class FlashmorphAttention(Qwen3Attention):
    """Projections of the teacher's attention, and between them one mixer for each key-value head and its queries."""

    def __init__(self, config: FlashmorphConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if not config.qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.attention_out_bias != config.attention_bias:
            self.o_proj = nn.Linear(self.o_proj.in_features, config.hidden_size, bias=config.attention_out_bias)
        self.rotates = not config.no_rope_layers or bool(config.no_rope_layers[layer_idx])
        self.sliding_window = None
        assert config.mixers is not None
        self.heads = {name: list(heads) for name, heads in config.mixers[layer_idx].items()}
        self.mixers = nn.ModuleDict(
            {name: self.new_mixer(name, len(heads)) for name, heads in self.heads.items() if name != FULL}
        )

    def new_mixer(self, name: str, heads: int) -> OwnMixer:
        """An untrained mixer of so many key-value heads of this layer."""
        config, groups = self.config, self.num_key_value_groups
        return make_mixer(config.mixer_settings[name], heads, groups, self.head_dim, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The output `[batch, time, width]`; in a hybrid layer `attention_mask` is a pair: causal, padding.

        `kwargs` has the cache under transformers' name, if there is one.
        """
        cache = kwargs.pop(CACHE, None)
        mixing: Any = {name: (heads, self.mixers[name] if name != FULL else None) for name, heads in self.heads.items()}
        return self.mix(mixing, hidden_states, position_embeddings, attention_mask, cache, **kwargs), None

    def mix(
        self,
        mixing: Mixing,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The output `[batch, time, width]` with these mixers, which may be others than the layer's own."""
        shape = (*hidden.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden).view(shape).transpose(1, 2)
        causal, real = attention_mask if isinstance(attention_mask, tuple) else (attention_mask, None)
        layer: Any = cache.layers[self.layer_idx] if cache is not None else None
        outputs: list[torch.Tensor] = []
        by_head: dict[int, torch.Tensor] = {}
        for name, (heads, mixer) in mixing.items():
            rows = self._own(q, k.shape[1], heads)
            key, value = (k, v) if len(heads) == k.shape[1] else (_heads(k, heads), _heads(v, heads))
            if mixer is not None and not mixer.key_bias:
                key = self._without_bias(key, heads)
            if mixer is not None and mixer.conv is not None:
                rows, key, value = mixer.conv(rows, key, value, hidden, real, self._state(layer, f"{name}.conv"))
            if self.rotates and (mixer is None or mixer.rotary):
                rows, key = apply_rotary_pos_emb(rows, key, *position_embeddings)
            if mixer is None:
                outputs.append(self._full(rows, key, value, causal, cache, **kwargs))
            else:
                mixed = mixer(rows, key, value, hidden, real, self._state(layer, name))
                outputs.append(mixed.transpose(1, 2).unflatten(2, (len(heads), self.num_key_value_groups)))
            by_head |= zip(heads, outputs[-1].split(1, 2), strict=True)
        if hasattr(layer, "seen"):  # By its class another copy of these files would not be known.
            layer.seen += hidden.shape[1]
        in_order = [by_head[head] for head in sorted(by_head)]
        output = outputs[0] if [*by_head] == sorted(by_head) and len(outputs) == 1 else torch.cat(in_order, 2)
        return self.o_proj(output.reshape(*hidden.shape[:2], -1))

    def _own(self, q: torch.Tensor, num_heads: int, heads: Sequence[int]) -> torch.Tensor:
        """The query heads of these key-value heads."""
        if len(heads) == num_heads:
            return q
        return _heads(q.unflatten(1, (num_heads, self.num_key_value_groups)), heads).flatten(1, 2)

    def _without_bias(self, key: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """Keys `[batch, heads, time, head_dim]` of these heads without the bias of their projection."""
        if self.k_proj.bias is None or self.config.qk_norm:
            return key
        bias = self.k_proj.bias.view(1, -1, 1, self.head_dim)
        return key - (bias if len(heads) == bias.shape[1] else _heads(bias, heads))

    def _full(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: torch.Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Full attention of some heads, `[batch, time, heads, groups, head_dim]`."""
        heads = k.shape[1]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        name = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = attend(self, q, k, v, causal, dropout=dropout, scaling=self.scaling, sliding_window=None, **kwargs)
        return output.unflatten(2, (heads, self.num_key_value_groups))

    def _state(self, layer: Any, name: str) -> dict[str, torch.Tensor] | None:
        return None if layer is None else layer.states.setdefault(name, {})


def _heads(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """These heads of `[batch, heads, ...]`, by slices: an index would be sent to the GPU for every token."""
    return torch.cat([x[:, head : head + 1] for head in heads], 1)


class _StartsMixers:
    """Of both models: weights of mixers that a checkpoint does not have get their start."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Starts):
            module.reset()


class FlashmorphModel(_StartsMixers, Qwen3Model):
    """The decoder: Qwen3's, with our attention in every layer and our cache layers in every cache."""

    config: FlashmorphConfig
    _can_compile_fullgraph = False
    _is_stateful = True

    def __init__(self, config: FlashmorphConfig):
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            layer.self_attn = FlashmorphAttention(config, number)
            if config.mlp_bias:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    plain = getattr(layer.mlp, name)
                    setattr(layer.mlp, name, nn.Linear(plain.in_features, plain.out_features))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ):
        """Last hidden states, as of Qwen3's decoder. The cache goes by both of its names in transformers.

        Raises:
            ValueError: a static or quantised cache, or one that another model has filled.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            own_layers(cache, [word == "hybrid" for word in self.config.layer_types or ()])
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            given: dict[str, Any] = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                CACHE: cache,
                "position_ids": position_ids,
            }
            masks = {"full_attention": create_causal_mask(**given)}
            masks["linear_attention"] = create_recurrent_attention_mask(**given)
        masks = {**masks, "hybrid": (masks["full_attention"], masks.get("linear_attention"))}
        prepared: dict[str, Any] = {"attention_mask": masks, "position_ids": position_ids, CACHE: cache}
        return super().forward(inputs_embeds=inputs_embeds, use_cache=use_cache, **prepared, **kwargs)


class FlashmorphForCausalLM(_StartsMixers, Qwen3ForCausalLM):
    """The decoder with its head."""

    config: FlashmorphConfig
    _can_compile_fullgraph = False
    _is_stateful = True

    def __init__(self, config: FlashmorphConfig):
        super().__init__(config)
        self.model = FlashmorphModel(config)
        self.post_init()


__all__ = ["FlashmorphForCausalLM", "FlashmorphModel"]
