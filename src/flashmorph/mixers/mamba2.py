"""Mamba2 (arXiv 2405.21060), transformers' own, beside the attention of Granite hybrid."""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from flashmorph.mixers.convolution import convolve
from flashmorph.mixers.kernels import boundaries_in
from flashmorph.mixers.mamba2_scan import CHUNK, chunk_scan
from flashmorph.mixers.mixer import LAYER_TYPES, LINEAR, Kernels, LayerArguments, Products
from flashmorph.mixers.products import STATE_BYTES, number_bytes
from flashmorph.mixers.start import constant_row, fit_head_scales, mean_distance

_FUNCTIONS = (
    "mamba2_chunk_scan",
    "mamba2_selective_state_update",
    "mamba2_split_conv1d_scan_combined",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)
_TAP = 0.1
_GATE = 2.0
_SURPLUS_DISTANCE = 0.25


class Mamba2:
    """Granite's Mamba2 layer. Its gated norm spans the heads of a group, so none of them can be left out alone."""

    name = "Mamba2"
    trainable = True
    borrows = False
    separable_by_head = False
    projection = "out_proj"
    kernels: Kernels | None = Kernels(
        GraniteMoeHybridMambaLayer.__module__,
        _FUNCTIONS,
        lean={_FUNCTIONS[0]: chunk_scan, _FUNCTIONS[3]: convolve},
        needs={_FUNCTIONS[2]: _FUNCTIONS[3]},
    )

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """transformers' own module."""
        config = copy.deepcopy(config)
        config.layer_types = [LAYER_TYPES[LINEAR]] * config.num_hidden_layers
        return GraniteMoeHybridMambaLayer(cast(Any, config), layer)

    def run(self, module: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """The output, given where documents begin, if anything."""
        return module(hidden_states=hidden, **boundaries_in(arguments))

    def supports_varlen(self, device: torch.device) -> bool:
        """Not yet: its kernels take `seq_idx`, but the attention beside it in Granite hybrid takes nothing."""
        return False

    @torch.no_grad()
    def initialise(self, module: Any, attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        """Start as the linear form of the attention: C from queries, B from keys, x from values.

        So MambaInLlama starts it (arXiv 2408.15237, section 3). Each head of the attention leads a group of Mamba heads
        that share its queries and keys. With fewer groups, neighbouring heads of one key-value head lead one together,
        by the mean of their queries. The surplus heads, also those of surplus groups, hold values of the same heads and
        look back a quarter as far. Convolution, decay, the gate `z` and one scale a head are as in
        `gated_delta_net.py`; biases of queries and values go into the convolution's. A softmax nearly cancels that of
        keys, which may be far larger than they are; a sum of products does not.
        """
        heads, head_dim, groups = attention.config.num_attention_heads, attention.head_dim, module.n_groups
        per_group, shared = module.num_heads // groups, attention.num_key_value_groups
        leaders = max(1, heads // groups)
        group, inside = (torch.arange(number, device=hidden.device) for number in (groups, per_group))
        leader = (group[:, None] * leaders + torch.arange(leaders, device=hidden.device)) % heads
        source = leader[:, inside % leaders].flatten()
        surplus = ((inside >= leaders) | (group[:, None] >= heads)).flatten()
        queries = [_heads(attention.q_proj, each, head_dim) for each in leader.T]
        keys, key_bias = _heads(attention.k_proj, leader[:, 0] // shared, head_dim)
        parts = [
            _heads(attention.v_proj, source // shared, head_dim),
            (keys, torch.zeros_like(key_bias)),
            tuple(torch.stack(each).mean(0) for each in zip(*queries, strict=True)),
        ]
        mixed, bias = (torch.cat(each) for each in zip(*parts, strict=True))
        spread = F.linear(hidden, mixed).flatten(0, 1).std(0).clamp_min(1e-6)
        scale = _TAP / spread.unflatten(0, (-1, head_dim)).mean(1).repeat_interleave(head_dim)
        gate = constant_row(hidden, _GATE).expand(module.intermediate_size, -1)
        steps = torch.zeros_like(module.in_proj.weight[: module.num_heads])
        module.in_proj.weight.copy_(torch.cat([gate, mixed, steps]))
        module.conv1d.weight.zero_()
        module.conv1d.weight[:, 0, -1] = scale
        module.conv1d.bias.copy_(bias * scale)
        # A step of softplus(0) = ln 2 and a rate of 1 / distance: half is forgotten at that distance.
        distance = mean_distance(attention, hidden, arguments)[source]
        module.dt_bias.zero_()
        module.A_log.copy_(-torch.where(surplus, distance * _SURPLUS_DISTANCE, distance).log())
        module.D.zero_()
        module.norm.weight.fill_(1.0)
        module.out_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, head_dim))[:, source].flatten(1))
        target = attention(hidden_states=hidden, **arguments)[0]
        fit_head_scales(module.out_proj, head_dim, lambda: module(hidden_states=hidden), target)

    def settle(self, modules: Sequence[Any]) -> None:
        """Nothing that all layers share has to be chosen."""

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """The convolution's inputs, and the recurrent state in float32."""
        channels, taps, numbers = self.state_numbers(config)
        return channels * taps * number_bytes(config) + numbers * STATE_BYTES

    def state_numbers(self, config: PreTrainedConfig) -> tuple[int, int, int]:
        """Channels and taps of the convolution, and numbers of the recurrent state, of one layer."""
        inner, convolved = _sizes(config)
        return convolved, config.mamba_d_conv, inner * config.mamba_d_state

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """In chunks (arXiv 2405.21060, section 6), C meeting B once for each group, as in `mamba2_scan.py`.

        Kernels do the same in the configuration's longer chunks, leaving out half of their pairs. A step decays, writes
        and queries the state.
        """
        width, heads, groups = config.hidden_size, config.mamba_n_heads, config.mamba_n_groups
        head_dim, state = config.mamba_d_head, config.mamba_d_state
        chunk = min(config.mamba_chunk_size, CHUNK)
        inner, convolved = _sizes(config)
        into = 2 * width * (inner + convolved + heads)
        convolution = 2 * config.mamba_d_conv * convolved
        padded = math.ceil(context / chunk) * chunk / context
        through = 4 * heads * state * head_dim
        pairs = 2 * (groups * state + heads * head_dim)
        scan = padded * (chunk * pairs + through)
        by_kernels = min(context, config.mamba_chunk_size) / 2 * pairs + through
        scan_formula = f"{chunk} · (2 · groups · state + 2 · heads · head_dim) + 4 · heads · state · head_dim"
        kernel_formula = "2 · kernel · (inner + 2 · groups · state)"
        return [
            Products("z, x, B, C, dt", "input", "2 · hidden · (2 · inner + 2 · groups · state + heads)", into),
            Products("convolution", "weights", kernel_formula, convolution, step=convolution),
            Products("scan", "state", scan_formula, scan, by_kernels / scan, step=5 * inner * state),
            Products("out", "weights", "2 · inner · hidden", 2 * inner * width),
        ]


def _sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Inner channels, and channels that are convolved, of one layer."""
    inner = config.mamba_n_heads * config.mamba_d_head
    return inner, inner + 2 * config.mamba_n_groups * config.mamba_d_state


def _heads(projection: nn.Linear, numbers: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[heads * head_dim, width]` and biases `[heads * head_dim]` of these heads of a projection."""
    bias = projection.weight.new_zeros(projection.out_features) if projection.bias is None else projection.bias
    weight, bias = (part.unflatten(0, (-1, head_dim))[numbers].flatten(0, 1) for part in (projection.weight, bias))
    return weight, bias
