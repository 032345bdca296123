"""Sliding windows in a class that reads `layer_types`: a layer is switched by one word, no weight changes.

There is nothing to align, and a plan needs no training. Chosen by the setting `host.window` of a recipe, or `--window`.
Qwen2, Qwen3 and SmolLM3 stay in their own class; Llama and Mistral move into Ministral, which computes the same.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import nn
from transformers import (
    MinistralConfig,
    MinistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.masking_utils import create_sliding_window_causal_mask

from flashmorph.errors import UserError
from flashmorph.hosts.checks import LLAMA_SETTINGS, ROPE_TYPES, refuse_rope, refuse_windows
from flashmorph.hosts.host import FEED_FORWARD, Products
from flashmorph.hosts.products import (
    attention_cache_bytes,
    attention_operations,
    attention_products,
    feed_forward_products,
)
from flashmorph.hosts.serving import READ, TRANSFORMERS, Engine, Gguf
from flashmorph.plan import FULL

SLIDING = "sliding"


class WindowHost:
    """One class whose layers attend fully or through a window of `window` tokens, the token itself included."""

    options: Mapping[str, str] = {FULL: "full_attention", SLIDING: "sliding_attention"}
    modelling = ""
    kernels: tuple[str, ...] = ()
    branches_train = False
    mixers: Mapping[str, str] = {FULL: "attention", SLIDING: "sliding window"}
    settings: Mapping[str, str] = {"window": "tokens that a switched layer sees, the token itself included"}

    def __init__(self, model_class: type[PreTrainedModel], teachers: Mapping[str, str], *engines: Engine):
        self.model_class = model_class
        self.name = model_class.__name__
        self.model_type = cast(Any, model_class.config_class).model_type
        self.teachers = teachers
        self.serves = (TRANSFORMERS, *engines)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse windows that are there already, and what Ministral does not compute of a teacher of another class."""
        refuse_windows(config, self.name)
        if config.model_type == self.model_type:
            return
        refuse_rope(config, self.name, ROPE_TYPES)
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name, False):
                raise UserError(f"the teacher has biases ({name}); {self.name} has none")

    def host_config(self, teacher: PreTrainedConfig, window: Annotated[int, Field(ge=2)] = 0) -> PreTrainedConfig:
        """The teacher's own configuration, every layer full, and the window that layers may be switched to.

        Raises:
            UserError: `window` is not below the teacher's longest context.
        """
        longest = teacher.max_position_embeddings
        if not 2 <= window < longest:
            raise UserError(f"host.window must be a number of tokens from 2 to below {longest:,}; got {window}")
        types = [self.options[FULL]] * teacher.num_hidden_layers
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

    def host_state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights as they are."""
        return dict(state)

    def with_layer_types(self, config: PreTrainedConfig, options: list[str]) -> PreTrainedConfig:
        """A copy; any order of layers will do."""
        config = copy.deepcopy(config)
        config.layer_types = [self.options[option] for option in options]
        return config

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """What transformers writes."""
        return values

    def attention_name(self, option: str) -> str:
        """Both are the same module."""
        return "self_attn"

    def make_branch(self, config: PreTrainedConfig, layer: int, option: str, attention: nn.Module) -> nn.Module:
        """The attention itself, looking through the window."""
        return _Window(attention)

    def run_branch(self, branch: Any, option: str, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Attention with the mask that its decoder layer passes, or with the window's."""
        return branch(hidden_states=hidden, **arguments)[0]

    def takes_boundaries(self, device: torch.device) -> bool:
        """On CUDA: both kinds of layer go by `position_ids`, in their mask or in variable-length flash attention."""
        return device.type == "cuda"

    def initialise(self, branch: Any, attention: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Nothing to start: a window has no weights."""

    def share_run(self, config: PreTrainedConfig, name: str) -> float:
        """All of it."""
        return 1.0

    def cache_bytes(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Keys and values, of a window all but one token's: the newest is in the forward that reads them."""
        tokens = context if option == FULL else min(context, config.sliding_window - 1)
        return attention_cache_bytes(config, tokens)

    def flops_per_token(self, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
        """Attention over the context or over its window, and a gated feed-forward."""
        if part == FEED_FORWARD:
            return feed_forward_products(config.hidden_size, config.intermediate_size)
        return attention_products(config, context, None if part == FULL else config.sliding_window)

    def mixing_operations(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Scores and their weighted sum, over the window at most."""
        tokens = context if option == FULL else min(context, config.sliding_window)
        return attention_operations(config, tokens)


class _Window(nn.Module):
    """An attention that sees its window only; its weights stay the attention's own."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        # In a list, so that the weights are not registered here a second time.
        self._attention = [attention]

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        attention = cast(Any, self._attention[0])
        mask = create_sliding_window_causal_mask(
            config=attention.config,
            inputs_embeds=hidden_states,
            attention_mask=None,
            past_key_values=None,
            position_ids=arguments.get("position_ids"),
        )
        # Flash attention reads the window from the module, not from the mask.
        attention.sliding_window = attention.config.sliding_window
        try:
            return attention(hidden_states=hidden_states, **{**arguments, "attention_mask": mask})
        finally:
            attention.sliding_window = None


_VLLM = Engine("vLLM", "0.33", READ, "start it with --model-impl transformers: its own class refuses windows by layer")
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
    WindowHost(SmolLM3ForCausalLM, {"smollm3": "SmolLM3, also with layers without RoPE"}),
    WindowHost(
        MinistralForCausalLM,
        {"ministral": "Ministral", "llama": "Llama without biases", "mistral": "Mistral without a window of its own"},
    ),
)
