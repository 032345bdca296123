"""Qwen3 in Qwen3.5: gated full attention and Gated DeltaNet.

The teacher moves exactly. Qwen3.5's attention multiplies its output by sigmoid(gate): zero gate rows make that 0.5, and
a doubled output projection takes it back. Its norms multiply by 1 + w: the teacher's weights less 1.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from flashmorph.hosts.checks import refuse_activation, refuse_rope, refuse_windows
from flashmorph.hosts.host import FEED_FORWARD, LINEAR, Products, layer_prefixes
from flashmorph.hosts.kernels import (
    REFERENCE,
    boundaries_in,
    convolve_apart,
    dispatch_by_device,
    implementation_in_use,
)
from flashmorph.hosts.products import (
    attention_cache_bytes,
    attention_operations,
    attention_products,
    feed_forward_products,
    number_bytes,
)
from flashmorph.hosts.serving import READ, RUN, TRANSFORMERS, Engine, Gguf, full_interval
from flashmorph.hosts.start import constant_row, fit_head_scales, mean_distance, softplus_inverse
from flashmorph.plan import FULL

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_SAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_bias "
    "attention_dropout pad_token_id bos_token_id eos_token_id"
).split()
_CONVOLUTION = 4
_CHUNK = 64
_FLOAT32_BYTES = 4
_TAP = 0.1
_GATE = 2.0


VLLM = Engine("vLLM", "0.33", READ)
SGLANG = Engine(
    "SGLang",
    "0.5.23",
    READ,
    needs="a full layer at regular intervals: it places them by full_attention_interval alone",
    fits=lambda config: full_interval([_OPTIONS[word] for word in config.layer_types]) > 0,
)
_OPTIONS = {"full_attention": FULL, "linear_attention": LINEAR}


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


class Qwen35Host:
    """Qwen3 (dense) in `Qwen3_5ForCausalLM` (`qwen3_5_text`)."""

    name = "Qwen3_5ForCausalLM"
    teachers: Mapping[str, str] = {"qwen3": "Qwen3 (dense)"}
    options: Mapping[str, str] = {FULL: "full_attention", LINEAR: "linear_attention"}
    mixers: Mapping[str, str] = {FULL: "gated attention", LINEAR: "Gated DeltaNet"}
    settings: Mapping[str, str] = {}
    serves: tuple[Engine, ...] = (
        TRANSFORMERS,
        VLLM,
        LLAMA_CPP,
        SGLANG,
    )
    model_class: type[PreTrainedModel] = Qwen3_5ForCausalLM
    mixer_class: type[nn.Module] = Qwen3_5GatedDeltaNet
    model_type = "qwen3_5_text"
    modelling = "transformers.models.qwen3_5.modeling_qwen3_5"
    branches_train = True
    kernels: tuple[str, ...] = (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    )
    mlp_readers: tuple[str, ...] = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    """The weights that read the output of a layer's second norm."""

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse sliding layers, rope types that Qwen3.5 does not compute, and activations other than SiLU."""
        refuse_windows(config, self.name)
        refuse_rope(config, self.name, _ROPE_TYPES)
        refuse_activation(config, self.name)

    def host_config(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """Same shapes."""
        return Qwen3_5TextConfig(**self.shape(teacher), intermediate_size=teacher.intermediate_size)

    def shape(self, teacher: PreTrainedConfig) -> dict[str, Any]:
        """All but the MLP; Gated DeltaNet gets one key and one value head for each query head."""
        return {
            **{name: getattr(teacher, name) for name in _SAME},
            "rope_parameters": {**teacher.rope_parameters, "partial_rotary_factor": 1.0},
            "layer_types": [self.options[FULL]] * teacher.num_hidden_layers,
            "linear_num_key_heads": teacher.num_attention_heads,
            "linear_num_value_heads": teacher.num_attention_heads,
            "linear_key_head_dim": teacher.head_dim,
            "linear_value_head_dim": teacher.head_dim,
            "linear_conv_kernel_dim": _CONVOLUTION,
            "dtype": teacher.dtype,
        }

    def host_state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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

    def with_layer_types(self, config: PreTrainedConfig, options: list[str]) -> PreTrainedConfig:
        """A copy; periodic plans also carry `full_attention_interval`, which SGLang places layers by."""
        config = copy.deepcopy(config)
        config.layer_types = [self.options[option] for option in options]
        if interval := full_interval(options):
            config.full_attention_interval = interval
        return config

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """As transformers writes it."""
        return values

    def attention_name(self, option: str) -> str:
        """Qwen3.5's decoder layer holds one of the two."""
        return {FULL: "self_attn", LINEAR: "linear_attn"}[option]

    def make_branch(self, config: PreTrainedConfig, layer: int, option: str, attention: nn.Module) -> nn.Module:
        """transformers' own Gated DeltaNet."""
        config = self.with_layer_types(config, [option] * config.num_hidden_layers)
        return cast(Any, self.mixer_class)(config, layer)

    def run_branch(self, branch: Any, option: str, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Attention gets everything its decoder layer passes; Gated DeltaNet where documents begin, if anything."""
        if option == FULL:
            return branch(hidden_states=hidden, **arguments)[0]
        return branch(hidden_states=hidden, **boundaries_in(arguments))

    def takes_boundaries(self, device: torch.device) -> bool:
        """Where the delta rule's kernel runs; the convolution can do with PyTorch."""
        return device.type == "cuda" and implementation_in_use(self.modelling, self.kernels[0]) != REFERENCE

    @torch.no_grad()
    def initialise(self, branch: Any, attention: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Gated DeltaNet that starts as the linear form of this attention.

        Queries and keys carry their norm's weights; keys and values are repeated to all heads. The convolution passes
        the current token only, scaled so that SiLU works where it is nearly linear (the scale itself is taken back by
        the norms). A head forgets half at the mean distance it attends to (Taylor-Calibrate, arXiv 2606.16429), half
        of a key's old value is overwritten. The gate `z` is the least-squares fit of a constant on the hidden states.
        The norm removes each head's amplitude: one scale a head, fitted to the attention's output, goes into
        `out_proj`.
        """
        heads, head_dim, groups = branch.num_v_heads, branch.head_v_dim, attention.num_key_value_groups
        query = attention.q_proj.weight.unflatten(0, (heads, 2, head_dim))[:, 0]
        key, value = (
            projection.weight.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0)
            for projection in (attention.k_proj, attention.v_proj)
        )
        query = query * (1 + attention.q_norm.weight)[:, None]
        key = key * (1 + attention.k_norm.weight)[:, None]
        mixed = torch.cat([part.flatten(0, 1) for part in (query, key, value)])
        spread = F.linear(hidden, mixed).flatten(0, 1).std(0).clamp_min(1e-6)
        scale = _TAP / spread.unflatten(0, (-1, head_dim)).mean(1, keepdim=True).expand(-1, head_dim).flatten()
        branch.in_proj_qkv.weight.copy_(mixed * scale[:, None])
        branch.conv1d.weight.zero_()
        branch.conv1d.weight[:, 0, -1] = 1.0
        branch.in_proj_z.weight.copy_(constant_row(hidden, _GATE).expand_as(branch.in_proj_z.weight))
        branch.in_proj_a.weight.zero_()
        branch.in_proj_b.weight.zero_()
        branch.A_log.zero_()
        branch.dt_bias.copy_(softplus_inverse(math.log(2) / mean_distance(attention, hidden, arguments)))
        branch.norm.weight.fill_(1.0)
        branch.out_proj.weight.copy_(attention.o_proj.weight / 2)
        target = self.run_branch(attention, FULL, hidden, arguments)
        fit_head_scales(branch.out_proj, head_dim, lambda: branch(hidden_states=hidden), target)

    def share_run(self, config: PreTrainedConfig, name: str) -> float:
        """Every weight is run."""
        return 1.0

    def cache_bytes(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Keys and values; or the convolution's inputs and the recurrent state, which is kept in float32."""
        if option == FULL:
            return attention_cache_bytes(config, context)
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return (2 * keys + values) * config.linear_conv_kernel_dim * number_bytes(config) + state * _FLOAT32_BYTES

    def mixing_operations(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Scores and their weighted sum; or decay, read, write and query of the state, and the convolution."""
        if option == FULL:
            return attention_operations(config, context)
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return 7 * state + 2 * (2 * keys + values) * config.linear_conv_kernel_dim

    def flops_per_token(self, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
        """Gated attention; Gated DeltaNet in chunks of 64 (arXiv 2412.06464, section 3.3); a gated feed-forward."""
        if part == FEED_FORWARD:
            return feed_forward_products(config.hidden_size, config.intermediate_size)
        if part == FULL:
            return attention_products(config, context, gated=True)
        width = config.hidden_size
        key, value, heads = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_num_value_heads
        keys, values = key * config.linear_num_key_heads, value * heads
        mixed = 2 * keys + values
        padded = math.ceil(context / _CHUNK) * _CHUNK / context
        into = 2 * width * (mixed + values + 2 * heads)
        rule = padded * heads * (6 * key * value + _CHUNK * (4 * key + 2 * value))
        rule_formula = f"heads · (6 · key_dim · value_dim + {_CHUNK} · (4 · key_dim + 2 · value_dim))"
        convolution = 2 * config.linear_conv_kernel_dim * mixed
        return [
            Products("q, k, v, z, a, b", "input", "2 · hidden · (2 · keys + 2 · values + 2 · heads)", into),
            Products("convolution", "weights", "2 · kernel · (2 · keys + values)", convolution),
            Products("delta rule", "state", rule_formula, rule),
            Products("out", "weights", "2 · values · hidden", 2 * values * width),
        ]


dispatch_by_device(Qwen35Host.modelling, Qwen35Host.kernels, apart={"causal_conv1d_fn": convolve_apart})


def _is_as_in_llama_cpp(config: PreTrainedConfig) -> bool:
    plain = config.rope_parameters["rope_type"] == "default" and not config.attention_bias
    return plain and config.head_dim >= 32 and "linear_attention" in config.layer_types


def _exact_factor(weight: torch.Tensor) -> torch.Tensor:
    """The power of two, with its sign, that brings each norm weight to 0.5 or more; 1 where it is 0 or large enough."""
    exponent = torch.ceil(torch.log2(0.5 / weight.abs().clamp_min(2.0**-100))).clamp_min(0)
    return torch.where(weight == 0, 1.0, torch.exp2(exponent) * weight.sign())
