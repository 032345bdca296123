"""Sliding windows in a class that reads `layer_types`: a layer is switched by one word, no weight changes.

There is nothing to align, and a plan needs no training. Chosen by the setting `host.window` of a recipe, or `--window`.
Qwen2, Qwen3 and SmolLM3 stay in their own class; Llama and Mistral move into Ministral, which computes the same.
"""

import copy
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from transformers import (
    MinistralConfig,
    MinistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)

from flashmorph.errors import UserError
from flashmorph.hosts.checks import LLAMA_SETTINGS, ROPE_TYPES, refuse_rope, refuse_windows
from flashmorph.hosts.host import Host
from flashmorph.hosts.serving import READ, RUN_ON_CPU, TRANSFORMERS, Engine, Gguf
from flashmorph.mixers import LAYER_TYPES, SLIDING, FullAttention, Mixer, Products, SlidingWindow
from flashmorph.mixers.products import feed_forward_products
from flashmorph.plan import FULL


class WindowHost(Host):
    """One class whose layers attend fully or through a window of `window` tokens, the token itself included."""

    mixers: Mapping[str, Mixer] = {FULL: FullAttention(), SLIDING: SlidingWindow()}
    settings: Mapping[str, str] = {"window": "tokens that a switched layer sees, the token itself included"}

    def __init__(self, model_class: type[PreTrainedModel], teachers: Mapping[str, str], *engines: Engine):
        self.model_class, self.teachers = model_class, teachers
        self.engines = (TRANSFORMERS, *engines)

    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse windows that are there already, and what Ministral does not compute of a teacher of another class."""
        refuse_windows(teacher, self.name)
        if teacher.model_type == self.model_type:
            return
        refuse_rope(teacher, self.name, ROPE_TYPES)
        for name in ("attention_bias", "mlp_bias"):
            if getattr(teacher, name, False):
                raise UserError(f"the teacher has biases ({name}); {self.name} has none")

    def config(self, teacher: PreTrainedConfig, window: Annotated[int, Field(ge=2)] = 0) -> PreTrainedConfig:
        """The teacher's own configuration, every layer full, and the window that layers may be switched to.

        Raises:
            UserError: `window` is not below the teacher's longest context.
        """
        longest = teacher.max_position_embeddings
        if not 2 <= window < longest:
            raise UserError(f"host.window must be a number of tokens from 2 to below {longest:,}; got {window}")
        types = [LAYER_TYPES[FULL]] * teacher.num_hidden_layers
        if teacher.model_type == self.model_type:
            config = copy.deepcopy(teacher)
            config.sliding_window, config.layer_types = window, types
            config.use_sliding_window = True
            if hasattr(config, "max_window_layers"):
                # transformers goes by layer_types. vLLM's own class ignores windows where this is the number of layers,
                # as published teachers have it, and refuses them otherwise.
                config.max_window_layers = 0
            return config
        same = {name: getattr(teacher, name) for name in (*LLAMA_SETTINGS, "head_dim")}
        rope = dict(teacher.rope_parameters)
        return MinistralConfig(
            **same, rope_parameters=rope, sliding_window=window, layer_types=types, dtype=teacher.dtype
        )

    def state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights as they are."""
        return dict(state)

    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """A gated feed-forward."""
        return feed_forward_products(config.hidden_size, config.intermediate_size)


_VLLM = Engine(
    "vLLM", "0.32", RUN_ON_CPU, "start it with --model-impl transformers: its own class refuses windows by layer"
)
_VLLM_AS_IT_IS = Engine("vLLM", "0.32", RUN_ON_CPU)  # It takes these classes from transformers by itself.
_LLAMA_CPP = Engine(
    "llama.cpp",
    "as in llama-cpp-python 0.3.36",
    READ,
    needs="every layer full: its own class ignores windows by layer",
    fits=lambda config: "sliding_attention" not in config.layer_types,
    gguf=Gguf(lambda fields: [False] * fields["block_count"]),
)
WINDOW_HOSTS = (
    WindowHost(Qwen3ForCausalLM, {"qwen3": "Qwen3 (dense)"}, _VLLM, _LLAMA_CPP),
    WindowHost(Qwen2ForCausalLM, {"qwen2": "Qwen2 and 2.5"}, _VLLM, _LLAMA_CPP),
    WindowHost(SmolLM3ForCausalLM, {"smollm3": "SmolLM3, also with layers without RoPE"}, _VLLM_AS_IT_IS),
    WindowHost(
        MinistralForCausalLM,
        {"ministral": "Ministral", "llama": "Llama without biases", "mistral": "Mistral without a window of its own"},
        _VLLM_AS_IT_IS,
    ),
)
