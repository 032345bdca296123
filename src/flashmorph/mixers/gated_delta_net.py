"""Gated DeltaNet (arXiv 2412.06464), transformers' own, beside the gated attention of Qwen3.5."""

import copy
import importlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from flashmorph.mixers.convolution import convolve
from flashmorph.mixers.delta_scan import delta_scan
from flashmorph.mixers.kernels import boundaries_in, kernel_runs
from flashmorph.mixers.mixer import LAYER_TYPES, LINEAR, Kernels, LayerArguments, Products
from flashmorph.mixers.products import STATE_BYTES, number_bytes
from flashmorph.mixers.start import (
    constant_row,
    fit_head_scales,
    mean_distance,
    merged,
    narrow_outputs,
    narrow_scores,
    softplus_inverse,
)

_CONVOLUTION = "causal_conv1d_fn"
_FUNCTIONS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    _CONVOLUTION,
    "causal_conv1d_update",
)
_CHUNK = 64
_TAP = 0.1
_GATE = 2.0


def no_gradient_of_fla() -> str:
    """Why flash-linear-attention computes no gradients here: its own check (0.6, `ops/common/chunk_o.py`)."""
    try:
        utils = importlib.import_module("fla.utils")
        wrong = utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1
    except (ImportError, AttributeError):
        return ""
    if not wrong or find_spec("tilelang"):
        return ""
    return (
        "flash-linear-attention computes no gradients on Hopper GPUs with Triton 3.4 to 3.7.0 (its result would be "
        "wrong); use a PyTorch that brings Triton 3.7.1 or later, or install tilelang"
    )


class GatedDeltaNet:
    """`module_class` of one of transformers' models; one key and one value head for each query head."""

    name = "Gated DeltaNet"
    trainable = True
    borrows = False
    separable_by_head = True
    projection = "out_proj"

    def __init__(self, module_class: type[nn.Module]):
        self._class = module_class
        self.kernels: Kernels | None = Kernels(
            module_class.__module__,
            _FUNCTIONS,
            apart={_CONVOLUTION: convolve},
            lean={_FUNCTIONS[0]: delta_scan},
            no_gradient=no_gradient_of_fla,
        )

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """transformers' own module."""
        config = copy.deepcopy(config)
        config.layer_types = [LAYER_TYPES[LINEAR]] * config.num_hidden_layers
        return cast(Any, self._class)(config, layer)

    def run(self, module: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """The output, given where documents begin, if anything."""
        return module(hidden_states=hidden, **boundaries_in(arguments))

    def supports_varlen(self, device: torch.device) -> bool:
        """On devices with the delta rule's kernel; the convolution can run in PyTorch."""
        assert self.kernels
        return kernel_runs(self.kernels, device)

    @torch.no_grad()
    def initialise(self, module: Any, attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        """Start as the linear form of the attention.

        Queries and keys carry their norm's weights. Keys and values are repeated to all heads; where there are fewer
        heads than the attention has, query heads of one key-value head that are neighbours share one, with the mean of
        their queries and the sum of their columns in `o_proj`. Narrower heads keep what matters most to scores and
        outputs. The convolution passes the current token only, scaled so that SiLU works where it is nearly linear (the
        scale itself is taken back by the norms). A head forgets half at the mean distance it attends to
        (Taylor-Calibrate, arXiv 2606.16429), half of a key's old value is overwritten. The gate `z` is the
        least-squares fit of a constant on the hidden states. The norm removes each head's amplitude: one scale a head,
        fitted to the attention's output, goes into `out_proj`.
        """
        heads, head_dim = attention.config.num_attention_heads, attention.head_dim
        keys, values, key_values = module.num_k_heads, module.num_v_heads, attention.config.num_key_value_heads
        query = merged(attention.q_proj.weight.unflatten(0, (heads, 2, head_dim))[:, 0], keys)
        key = attention.k_proj.weight.unflatten(0, (-1, head_dim)).repeat_interleave(keys // key_values, 0)
        value = attention.v_proj.weight.unflatten(0, (-1, head_dim)).repeat_interleave(values // key_values, 0)
        query = query * (1 + attention.q_norm.weight)[:, None]
        key = key * (1 + attention.k_norm.weight)[:, None]
        columns = attention.o_proj.weight.T.unflatten(0, (heads, head_dim))
        columns = merged(columns, values) * (heads // values) / 2
        query, key = narrow_scores(hidden, query, key, module.head_k_dim)
        value, columns = narrow_outputs(hidden, value, columns, module.head_v_dim)
        module.in_proj_qkv.weight.copy_(torch.cat([_spread_evenly(hidden, rows) for rows in (query, key, value)]))
        module.conv1d.weight.zero_()
        module.conv1d.weight[:, 0, -1] = 1.0
        module.in_proj_z.weight.copy_(constant_row(hidden, _GATE).expand_as(module.in_proj_z.weight))
        module.in_proj_a.weight.zero_()
        module.in_proj_b.weight.zero_()
        module.A_log.zero_()
        distance = merged(mean_distance(attention, hidden, arguments), values)
        module.dt_bias.copy_(softplus_inverse(math.log(2) / distance))
        module.norm.weight.fill_(1.0)
        module.out_proj.weight.copy_(columns.flatten(0, 1).T)
        target = attention(hidden_states=hidden, **arguments)[0]
        fit_head_scales(module.out_proj, module.head_v_dim, lambda: module(hidden_states=hidden), target)

    def settle(self, modules: Sequence[Any]) -> None:
        """Nothing that all layers share has to be chosen."""

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """The convolution's inputs, and the recurrent state in float32."""
        channels, taps, numbers = self.state_numbers(config)
        return channels * taps * number_bytes(config) + numbers * STATE_BYTES

    def state_numbers(self, config: PreTrainedConfig) -> tuple[int, int, int]:
        """Channels and taps of the convolution, and numbers of the recurrent state, of one layer."""
        mixed, _, state = _sizes(config)
        return mixed, config.linear_conv_kernel_dim, state

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """In chunks of 64 (arXiv 2412.06464, section 3.3); a step decays, reads, writes and queries the state."""
        width = config.hidden_size
        key, value, heads = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_num_value_heads
        mixed, values, state = _sizes(config)
        padded = math.ceil(context / _CHUNK) * _CHUNK / context
        into = 2 * width * (mixed + values + 2 * heads)
        rule = padded * heads * (6 * key * value + _CHUNK * (4 * key + 2 * value))
        rule_formula = f"heads · (6 · key_dim · value_dim + {_CHUNK} · (4 · key_dim + 2 · value_dim))"
        convolution = 2 * config.linear_conv_kernel_dim * mixed
        return [
            Products("q, k, v, z, a, b", "input", "2 · hidden · (2 · keys + 2 · values + 2 · heads)", into),
            Products("convolution", "weights", "2 · kernel · (2 · keys + values)", convolution, step=convolution),
            Products("delta rule", "state", rule_formula, rule, step=7 * state),
            Products("out", "weights", "2 · values · hidden", 2 * values * width),
        ]


def _spread_evenly(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `[heads, width, hidden]` one after the other, each head scaled to a mean standard deviation of `_TAP`."""
    flat = rows.flatten(0, 1)
    spread = F.linear(hidden, flat).flatten(0, 1).std(0).clamp_min(1e-6)
    scale = _TAP / spread.unflatten(0, (len(rows), -1)).mean(1)
    return flat * scale.repeat_interleave(rows.shape[1])[:, None]


def _sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels that are convolved, values, and numbers of the state, of one layer."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return 2 * keys + values, values, values * config.linear_key_head_dim
