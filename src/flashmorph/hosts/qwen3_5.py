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
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Attention, Qwen3_5GatedDeltaNet

from flashmorph.errors import UserError
from flashmorph.hosts.host import FEED_FORWARD, LINEAR, Products
from flashmorph.hosts.kernels import REFERENCE, convolve_apart, dispatch_by_device, implementation_in_use
from flashmorph.plan import FULL

MODELLING = "transformers.models.qwen3_5.modeling_qwen3_5"
KERNELS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)
dispatch_by_device(MODELLING, KERNELS, apart={"causal_conv1d_fn": convolve_apart})

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_bias "
    "attention_dropout pad_token_id bos_token_id eos_token_id"
).split()
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_BOUNDARIES = ("cu_seq_lens_q", "seq_idx")
_CONVOLUTION = 4
_CHUNK = 64
_FLOAT32_BYTES = 4
_TAP = 0.1
_GATE = 2.0
_RIDGE = 1e-2


class Qwen35Host:
    """Qwen3 (dense) in `Qwen3_5ForCausalLM` (`qwen3_5_text`)."""

    name = "Qwen3_5ForCausalLM"
    teachers: tuple[str, ...] = ("qwen3",)
    options: Mapping[str, str] = {FULL: "full_attention", LINEAR: "linear_attention"}
    serves = "transformers, vLLM, llama.cpp; SGLang only for plans with a full layer at regular intervals"
    model_class: type[PreTrainedModel] = Qwen3_5ForCausalLM
    model_type = "qwen3_5_text"

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse sliding layers, rope types that Qwen3.5 does not compute, and activations other than SiLU."""
        types = set(getattr(config, "layer_types", None) or [])
        if types - {"full_attention"}:
            raise UserError(
                f"the teacher has layers of type {', '.join(sorted(types - {'full_attention'}))}; "
                f"{self.name} can hold full attention only, so the move would not be exact"
            )
        rope = config.rope_parameters["rope_type"]
        if rope not in _ROPE_TYPES:
            raise UserError(f"the teacher's rope type {rope!r} is not exact in {self.name}; {_ROPE_TYPES} are")
        if config.hidden_act != "silu":
            raise UserError(f"the teacher's activation {config.hidden_act!r} is not exact in {self.name}; silu is")

    def host_config(self, teacher: PreTrainedConfig) -> Qwen3_5TextConfig:
        """Same shapes; Gated DeltaNet gets one key and one value head for each query head."""
        return Qwen3_5TextConfig(
            **{name: getattr(teacher, name) for name in _SAME},
            rope_parameters={**teacher.rope_parameters, "partial_rotary_factor": 1.0},
            layer_types=[self.options[FULL]] * teacher.num_hidden_layers,
            linear_num_key_heads=teacher.num_attention_heads,
            linear_num_value_heads=teacher.num_attention_heads,
            linear_key_head_dim=teacher.head_dim,
            linear_value_head_dim=teacher.head_dim,
            linear_conv_kernel_dim=_CONVOLUTION,
            dtype=teacher.dtype,
        )

    def host_state(self, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The teacher's weights under the host's names.

        In bfloat16 `w - 1` keeps all digits of w only from 0.5 on. So a smaller weight of a layer's norm is first
        multiplied by a power of two, which the columns that read this channel take back: both are exact.
        """
        head_dim = teacher.config.head_dim
        state = dict(teacher.state_dict())
        for norm, readers in _READERS.items():
            for layer in range(teacher.config.num_hidden_layers):
                prefix = f"model.layers.{layer}."
                factor = _exact_factor(state[f"{prefix}{norm}.weight"])
                state[f"{prefix}{norm}.weight"] = state[f"{prefix}{norm}.weight"] * factor
                for reader in readers:
                    state[f"{prefix}{reader}.weight"] = state[f"{prefix}{reader}.weight"] / factor
        for name, weight in state.items():
            if name.endswith("norm.weight"):
                state[name] = weight - 1
            elif ".q_proj." in name:
                heads = weight.unflatten(0, (-1, head_dim))
                state[name] = torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1)
            elif name.endswith(".o_proj.weight"):
                state[name] = weight * 2
        return state

    def with_layer_types(self, config: PreTrainedConfig, options: list[str]) -> PreTrainedConfig:
        """A copy; periodic plans also carry `full_attention_interval`, which SGLang places layers by."""
        config = copy.deepcopy(config)
        config.layer_types = [self.options[option] for option in options]
        interval = options.index(FULL) + 1 if FULL in options else 0
        if interval and all((option == FULL) == ((place + 1) % interval == 0) for place, option in enumerate(options)):
            config.full_attention_interval = interval
        return config

    def attention_name(self, option: str) -> str:
        """Qwen3.5's decoder layer holds one of the two."""
        return {FULL: "self_attn", LINEAR: "linear_attn"}[option]

    def make_branch(self, config: PreTrainedConfig, layer: int, option: str) -> nn.Module:
        """transformers' own Gated DeltaNet."""
        config = self.with_layer_types(config, [option] * config.num_hidden_layers)
        return Qwen3_5GatedDeltaNet(cast(Any, config), layer)

    def run_branch(self, branch: Any, option: str, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Attention gets everything its decoder layer passes; Gated DeltaNet where documents begin, if anything."""
        if option == FULL:
            return branch(hidden_states=hidden, **arguments)[0]
        boundaries = {name: arguments[name] for name in _BOUNDARIES if name in arguments}
        return branch(hidden_states=hidden, **boundaries)

    def takes_boundaries(self, device: torch.device) -> bool:
        """Where the delta rule's kernel runs; the convolution can do with PyTorch."""
        return device.type == "cuda" and implementation_in_use(MODELLING, KERNELS[0]) != REFERENCE

    @torch.no_grad()
    def initialise(
        self, branch: Qwen3_5GatedDeltaNet, attention: Qwen3_5Attention, hidden: torch.Tensor, arguments: dict[str, Any]
    ) -> None:
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
        flat = hidden.flatten(0, 1).double()
        gram = flat.T @ flat
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        constant = torch.linalg.solve(gram, flat.sum(0)).to(hidden.dtype) * _GATE
        branch.in_proj_z.weight.copy_(constant.expand_as(branch.in_proj_z.weight))
        branch.in_proj_a.weight.zero_()
        branch.in_proj_b.weight.zero_()
        branch.A_log.zero_()
        branch.dt_bias.copy_(_softplus_inverse(math.log(2) / _mean_distance(attention, hidden, arguments)))
        branch.norm.weight.fill_(1.0)
        branch.out_proj.weight.copy_(attention.o_proj.weight / 2)
        _fit_head_scales(branch, hidden, self.run_branch(attention, FULL, hidden, arguments))

    def cache_bytes(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Keys and values; or the convolution's inputs and the recurrent state, which is kept in float32."""
        width = torch.empty(0, dtype=cast(torch.dtype, config.dtype)).element_size()
        if option == FULL:
            return 2 * config.num_key_value_heads * config.head_dim * context * width
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return (2 * keys + values) * config.linear_conv_kernel_dim * width + state * _FLOAT32_BYTES

    def flops_per_token(self, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
        """Gated attention; Gated DeltaNet in chunks of 64 (arXiv 2412.06464, section 3.3); a gated feed-forward."""
        width, head_dim = config.hidden_size, config.head_dim
        if part == FEED_FORWARD:
            flops = 6 * width * config.intermediate_size
            return [Products("gate, up, down", "weights", "6 · hidden · intermediate", flops)]
        if part == FULL:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            into = 2 * width * (2 * heads + 2 * groups) * head_dim
            return [
                Products("q, gate, k, v", "input", "2 · hidden · (2 · heads + 2 · kv_heads) · head_dim", into),
                Products("scores, values", "scores", "4 · context · heads · head_dim", 4 * context * heads * head_dim),
                Products("out", "weights", "2 · heads · head_dim · hidden", 2 * heads * head_dim * width),
            ]
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


def _exact_factor(weight: torch.Tensor) -> torch.Tensor:
    """The power of two, with its sign, that brings each norm weight to 0.5 or more; 1 where it is 0 or large enough."""
    exponent = torch.ceil(torch.log2(0.5 / weight.abs().clamp_min(2.0**-100))).clamp_min(0)
    return torch.where(weight == 0, 1.0, torch.exp2(exponent) * weight.sign())


def _softplus_inverse(value: torch.Tensor) -> torch.Tensor:
    return value + torch.log(-torch.expm1(-value))


def _mean_distance(attention: Qwen3_5Attention, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Mean distance in tokens that each head looks back, `[heads]`, at least one token."""
    implementation = attention.config._attn_implementation
    time = hidden.shape[1]
    distance = torch.arange(time, device=hidden.device)[:, None] - torch.arange(time, device=hidden.device)
    mask = torch.zeros(time, time, dtype=hidden.dtype, device=hidden.device)
    mask = mask.masked_fill(distance < 0, torch.finfo(hidden.dtype).min)[None, None]
    try:
        attention.config._attn_implementation = "eager"
        _, weights = attention(hidden_states=hidden, **{**arguments, "attention_mask": mask})
    finally:
        attention.config._attn_implementation = implementation
    return (weights * distance).sum(-1).mean((0, 2)).clamp_min(1.0)


def _fit_head_scales(branch: Qwen3_5GatedDeltaNet, hidden: torch.Tensor, target: torch.Tensor) -> None:
    """Least squares: one factor a head, so that the heads' outputs add up to `target` `[batch, time, width]`.

    The normal equations come from products of width by width, so the heads' outputs never exist side by side.
    """
    inputs = []
    handle = branch.out_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    branch(hidden_states=hidden)
    handle.remove()
    mixed, weight = inputs[0].flatten(0, -2).double(), branch.out_proj.weight
    products = (mixed.T @ mixed) * (weight.T @ weight)
    size = (branch.num_v_heads, branch.head_v_dim)
    gram = products.unflatten(1, size).sum(2).unflatten(0, size).sum(1)
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    towards = (mixed.T @ target.flatten(0, -2).double() * weight.T).sum(1).unflatten(0, size).sum(1)
    scales = torch.linalg.solve(gram, towards)
    weight.mul_(scales.to(weight.dtype).repeat_interleave(branch.head_v_dim))
