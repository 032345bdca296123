"""Qwen3 in Qwen3.5: gated full attention and Gated DeltaNet.

The teacher moves exactly. Qwen3.5's attention multiplies its output by sigmoid(gate): zero gate rows make that 0.5, and
a doubled output projection takes it back. Its norms multiply by 1 + w: the teacher's weights less 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from flashmorph.errors import UserError
from flashmorph.hosts.checks import refuse_activation, refuse_rope, refuse_windows
from flashmorph.hosts.host import Host, layer_prefixes
from flashmorph.hosts.serving import READ, RUN, RUN_ON_CPU, TRANSFORMERS, Engine, Gguf, full_interval
from flashmorph.mixers import LAYER_TYPES, LINEAR, FullAttention, GatedDeltaNet, Mixer, Products
from flashmorph.mixers.products import feed_forward_products
from flashmorph.plan import FULL

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_SAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_bias "
    "attention_dropout pad_token_id bos_token_id eos_token_id"
).split()
_CONVOLUTION = 4
LinearSize = Annotated[int | None, Field(gt=0)]
"""Number or width of heads of a linear mixer; None: by the teacher's shape."""


VLLM = Engine(
    "vLLM",
    "0.32",
    RUN_ON_CPU,
    takes="on a CPU with heads of 64 or 128 in bfloat16; on Hopper with heads other than 128 start it with "
    "--gdn-prefill-backend triton (read in its source)",
)
SGLANG = Engine(
    "SGLang",
    "0.5.23",
    READ,
    needs="a full layer at regular intervals: it places them by full_attention_interval alone",
    fits=lambda config: full_interval([_OPTIONS[word] for word in config.layer_types]) > 0,
)
_OPTIONS = {word: option for option, word in LAYER_TYPES.items()}


def _switched(fields: Mapping[str, Any]) -> list[bool]:
    """The explicit list; files of older converters have the interval only, which the engine then goes by."""
    if (listed := fields.get("attention.recurrent_layers")) is not None:
        return list(listed)
    return [bool(layer % fields["full_attention_interval"]) for layer in range(1, fields["block_count"] + 1)]


_GGUF = Gguf(
    _switched,
    flags=("--no-mtp",),
    fields=lambda config: {
        "rope.dimension_count": int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    },
    irregular="add_recurrent_layers",
)
LLAMA_CPP = Engine(
    "llama.cpp",
    "of September 2026 (pull request 28208); older ones misread irregular plans without a word",
    RUN,
    takes="convert with `flashmorph export`, or by hand with --no-mtp",
    needs="at least one linear layer, heads of 32 or more, no biases, and rope that is not scaled",
    fits=lambda config: _is_as_in_llama_cpp(config),
    gguf=_GGUF,
)


class Qwen35Host(Host):
    """Qwen3 (dense) in `Qwen3_5ForCausalLM` (`qwen3_5_text`)."""

    teachers: Mapping[str, str] = {"qwen3": "Qwen3 (dense)"}
    engines: tuple[Engine, ...] = (TRANSFORMERS, VLLM, LLAMA_CPP, SGLANG)
    model_class: type[PreTrainedModel] = Qwen3_5ForCausalLM
    config_class: Callable[..., PreTrainedConfig] = Qwen3_5TextConfig
    settings: Mapping[str, str] = {
        "key_heads": "query and key heads of Gated DeltaNet, from the teacher's key-value heads to its query heads, "
        "which is the default: fewer make smaller layers that keep less",
        "value_heads": "value heads, key_heads or a multiple of them",
        "key_dim": "width of a query and key head, at most the teacher's; default: the teacher's",
        "value_dim": "width of a value head, likewise",
    }
    mixers: Mapping[str, Mixer] = {
        FULL: FullAttention("gated attention", gated=True),
        LINEAR: GatedDeltaNet(Qwen3_5GatedDeltaNet),
    }
    mlp_readers: tuple[str, ...] = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    """The weights that read the output of a layer's second norm."""

    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse sliding layers, rope types that Qwen3.5 does not compute, and activations other than SiLU."""
        refuse_windows(teacher, self.name)
        refuse_rope(teacher, self.name, _ROPE_TYPES)
        refuse_activation(teacher, self.name)

    def config(
        self,
        teacher: PreTrainedConfig,
        key_heads: LinearSize = None,
        value_heads: LinearSize = None,
        key_dim: LinearSize = None,
        value_dim: LinearSize = None,
    ) -> PreTrainedConfig:
        """Same shapes.

        Raises:
            UserError: Gated DeltaNet's heads cannot be made of the teacher's.
        """
        return self.config_class(
            **{name: getattr(teacher, name) for name in _SAME},
            **self.mlp_shape(teacher),
            **_delta_net_shape(teacher, key_heads, value_heads, key_dim, value_dim),
            rope_parameters={**teacher.rope_parameters, "partial_rotary_factor": 1.0},
            layer_types=[LAYER_TYPES[FULL]] * teacher.num_hidden_layers,
            linear_conv_kernel_dim=_CONVOLUTION,
            dtype=teacher.dtype,
        )

    def mlp_shape(self, teacher: PreTrainedConfig) -> dict[str, Any]:
        """The feed-forward's fields of the configuration."""
        return {"intermediate_size": teacher.intermediate_size}

    def state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights under the host's names.

        In bfloat16 `w - 1` keeps all digits of w only from 0.5 on. So a smaller weight of a layer's norm is first
        multiplied by a power of two, which the columns that read this channel take back: both are exact.
        """
        state = self.teacher_state(teacher, state)
        norms = {
            "input_layernorm.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
            "post_attention_layernorm.weight": self.mlp_readers,
        }
        for norm, readers in norms.items():
            for prefix in layer_prefixes(state):
                factor = _exact_factor(state[prefix + norm])
                state[prefix + norm] = state[prefix + norm] * factor
                for reader in readers:
                    state[prefix + reader] = state[prefix + reader] / factor
        for name, weight in state.items():
            if name.endswith("norm.weight"):
                state[name] = weight - 1
            elif ".q_proj." in name:
                heads = weight.unflatten(0, (-1, teacher.head_dim))
                state[name] = torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1)
            elif name.endswith(".o_proj.weight"):
                state[name] = weight * 2
        return state

    def teacher_state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights, under names that the host has as well."""
        return dict(state)

    def with_plan(self, config: PreTrainedConfig, options: Sequence[str]) -> PreTrainedConfig:
        """A copy; periodic plans also carry `full_attention_interval`, which SGLang goes by."""
        config = super().with_plan(config, options)
        if interval := full_interval(options):
            config.full_attention_interval = interval
        return config

    def serialise(self, values: dict[str, Any]) -> dict[str, Any]:
        """With `mamba_ssm_dtype`, as published Qwen3.5 have it: engines would keep the state in the model's dtype.

        transformers keeps it in float32 and does not read the field, which it reads and writes again as it is.
        """
        return {**values, "mamba_ssm_dtype": values.get("mamba_ssm_dtype", "float32")}

    def slot(self, option: str) -> str:
        """Qwen3.5's decoder layer holds one of the two."""
        return {FULL: "self_attn", LINEAR: "linear_attn"}[option]

    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """A gated feed-forward."""
        return feed_forward_products(config.hidden_size, config.intermediate_size)


def _delta_net_shape(
    teacher: PreTrainedConfig, keys: int | None, values: int | None, key_dim: int | None, value_dim: int | None
) -> dict[str, int]:
    """Gated DeltaNet's fields of the configuration.

    Raises:
        UserError: heads of this number or width cannot be made of the teacher's.
    """
    keys, values = _linear_heads(teacher, keys, values)
    for name, width in (("key_dim", key_dim), ("value_dim", value_dim)):
        if (width or 0) > teacher.head_dim:
            raise UserError(f"host.{name}={width} is wider than the teacher's heads of {teacher.head_dim}")
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": key_dim or teacher.head_dim,
        "linear_value_head_dim": value_dim or teacher.head_dim,
    }


def _linear_heads(teacher: PreTrainedConfig, keys: int | None, values: int | None) -> tuple[int, int]:
    """Key and value heads of Gated DeltaNet; without a number one for each query head.

    Raises:
        UserError: they are not between the teacher's key-value and query heads, or do not divide.
    """
    queries, key_values = teacher.num_attention_heads, teacher.num_key_value_heads
    possible = [heads for heads in range(key_values, queries + 1, key_values) if queries % heads == 0]
    keys = keys or values or queries
    values = values or keys
    assert keys and values
    for name, heads in (("key_heads", keys), ("value_heads", values)):
        if heads not in possible:
            listed = ", ".join(map(str, possible))
            raise UserError(f"host.{name}={heads} cannot be made of the teacher's heads; these can: {listed}")
    if values % keys:
        raise UserError(f"host.value_heads={values} is no multiple of host.key_heads={keys}")
    return keys, values


def _is_as_in_llama_cpp(config: PreTrainedConfig) -> bool:
    plain = config.rope_parameters["rope_type"] == "default" and not config.attention_bias
    return plain and config.head_dim >= 32 and "linear_attention" in config.layer_types


def _exact_factor(weight: torch.Tensor) -> torch.Tensor:
    """The power of two, with its sign, that brings each norm weight to 0.5 or more; 1 where it is 0 or large enough."""
    exponent = torch.ceil(torch.log2(0.5 / weight.abs().clamp_min(2.0**-100))).clamp_min(0)
    return torch.where(weight == 0, 1.0, torch.exp2(exponent) * weight.sign())
