"""Llama and its relatives in Granite hybrid: grouped-query attention and Mamba2.

The teacher moves exactly, weight by weight: gate and up projection stand on top of each other in one matrix, and
Granite's multipliers are 1, or the teacher's own where it is a Granite.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from flashmorph.errors import UserError
from flashmorph.hosts.checks import (
    LLAMA_SETTINGS,
    ROPE_TYPES,
    refuse_activation,
    refuse_rope,
    refuse_two_factors,
    refuse_windows,
)
from flashmorph.hosts.host import FEED_FORWARD, LINEAR, Products, layer_prefixes
from flashmorph.hosts.kernels import boundaries_in, dispatch_by_device
from flashmorph.hosts.products import (
    attention_cache_bytes,
    attention_operations,
    attention_products,
    feed_forward_products,
    head_dim_of,
    number_bytes,
)
from flashmorph.hosts.serving import READ, RUN, TRANSFORMERS, Engine, Gguf
from flashmorph.hosts.start import constant_row, fit_head_scales, mean_distance
from flashmorph.plan import FULL

_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
_BIASED = ("qwen2",)
"""Teachers whose configuration does not say that queries, keys and values have a bias."""
_STARTING_ANEW = ("phi3",)
"""Teachers that drop the cache in `generate` where the other list of rope factors begins."""
_OLDER_WORDS = {"full_attention": "attention", "linear_attention": "mamba"}
_CONVOLUTION = 4
_FLOAT32_BYTES = 4
_TAP = 0.1
_GATE = 2.0
_SURPLUS_DISTANCE = 0.25
_SQUARE = "heads × head_dim = hidden size"
# llama.cpp takes a Granite hybrid for one without rope, and its context for boundless, unless the file says otherwise.
_GGUF = Gguf(
    lambda fields: [heads == 0 for heads in fields["attention.head_count_kv"]],
    fields=lambda config: {
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
        "context_length": config.max_position_embeddings,
    },
)


class GraniteHybridHost:
    """Llama-shaped teachers in `GraniteMoeHybridForCausalLM` (`granitemoehybrid`), without experts."""

    name = "GraniteMoeHybridForCausalLM"
    teachers: Mapping[str, str] = {
        "llama": "Llama and what has its shape",
        "mistral": "Mistral without a window (Nemo, Small, 7B from v0.2 on)",
        "ministral": "Ministral with every layer full",
        "qwen2": "Qwen2, Qwen2.5",
        "seed_oss": "Seed-OSS",
        "granite": "Granite (dense)",
        "smollm3": "SmolLM3 with RoPE in every layer",
        "phi3": "Phi-3, Phi-4 without a window, rotating whole heads, with one list of rope factors at most",
    }
    options: Mapping[str, str] = {FULL: "full_attention", LINEAR: "linear_attention"}
    mixers: Mapping[str, str] = {FULL: "attention", LINEAR: "Mamba2"}
    settings: Mapping[str, str] = {
        "mamba_expand": "width of Mamba2 over the hidden size, 2 or 1: smaller layers with 1, llama.cpp only with 2"
    }
    serves: tuple[Engine, ...] = (
        TRANSFORMERS,
        Engine(
            "vLLM",
            "0.33",
            READ,
            needs=_SQUARE,
            otherwise="It loads any other without a word, and answers nonsense.",
            fits=lambda config: _is_square(config),
        ),
        Engine("SGLang", "0.5.23", READ, needs=_SQUARE, fits=lambda config: _is_square(config)),
        Engine(
            "llama.cpp",
            "as in llama-cpp-python 0.3.36",
            RUN,
            takes="convert with `flashmorph export`, which sets rope.scaling.finetuned and context_length",
            needs=f"mamba_expand 2, a linear layer, rope that is not scaled, {_SQUARE} and a vocabulary divisible by 8",
            fits=lambda config: _is_as_in_llama_cpp(config),
            gguf=_GGUF,
        ),
    )
    model_class: type[PreTrainedModel] = GraniteMoeHybridForCausalLM
    model_type = "granitemoehybrid"
    modelling = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"
    branches_train = True
    kernels: tuple[str, ...] = (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba2_split_conv1d_scan_combined",
        "mamba2_selective_state_update",
        "mamba2_chunk_scan",
    )

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse windows, layers without RoPE, biases in the MLP, and what Granite hybrid computes otherwise.

        Of Phi-3 also two lists of rope factors, between which its class starts anew in `generate`.
        """
        refuse_windows(config, self.name)
        if 0 in (getattr(config, "no_rope_layers", None) or []):
            raise UserError(
                f"the teacher has layers without RoPE (no_rope_layers); {self.name} has RoPE in all layers or in none"
            )
        refuse_rope(config, self.name, ROPE_TYPES)
        if config.model_type in _STARTING_ANEW:
            refuse_two_factors(config, self.name)
        refuse_activation(config, self.name)
        if getattr(config, "mlp_bias", False):
            raise UserError(f"the teacher's MLP has biases (mlp_bias); {self.name} has none there")

    def host_config(self, teacher: PreTrainedConfig, mamba_expand: Literal[1, 2] = 2) -> GraniteMoeHybridConfig:
        """Same shapes; Mamba heads are as wide as the attention's and fill `mamba_expand` times the hidden size.

        2 is Granite's own value and the only one that llama.cpp reads; 1 makes the linear layers smaller.

        Raises:
            UserError: the teacher's heads do not fit.
        """
        head_dim, heads = head_dim_of(teacher), teacher.num_attention_heads
        inner = mamba_expand * teacher.hidden_size
        about = f"mamba_expand × hidden size = {mamba_expand} × {teacher.hidden_size:,}"
        if inner % head_dim:
            raise UserError(f"the teacher's heads of {head_dim} do not divide {about}: no whole number of Mamba heads")
        if heads * head_dim > inner:
            raise UserError(f"the teacher's {heads} heads of {head_dim} do not fit into {about} of {self.name}")
        mamba_heads = inner // head_dim
        same: dict[str, Any] = {name: getattr(teacher, name) for name in LLAMA_SETTINGS}
        same |= {name: getattr(teacher, name, 1.0) for name in _MULTIPLIERS} | {"head_dim": head_dim}
        return GraniteMoeHybridConfig(
            **same,
            attention_multiplier=getattr(teacher, "attention_multiplier", head_dim**-0.5),
            attention_bias=_has_bias(teacher),
            position_embedding_type="rope",
            rope_parameters=dict(teacher.rope_parameters),
            shared_intermediate_size=teacher.intermediate_size,
            num_local_experts=0,
            num_experts_per_tok=0,
            layer_types=[self.options[FULL]] * teacher.num_hidden_layers,
            mamba_expand=mamba_expand,
            mamba_n_heads=mamba_heads,
            # Keys and queries belong to a group of Mamba heads: the fewest groups that give each attention head one.
            mamba_n_groups=next(n for n in range(heads, mamba_heads + 1) if mamba_heads % n == 0),
            mamba_d_head=head_dim,
            mamba_d_state=head_dim,
            mamba_d_conv=_CONVOLUTION,
            dtype=teacher.dtype,
        )

    def host_state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights under the host's names, none of them changed; a bias that it lacks is zero."""
        state = dict(state)
        key_rows = teacher.num_key_value_heads * head_dim_of(teacher)
        for layer in layer_prefixes(state):
            mixer, mlp, shared = (f"{layer}{name}." for name in ("self_attn", "mlp", "shared_mlp"))
            if f"{mixer}qkv_proj.weight" in state:
                fused = state.pop(f"{mixer}qkv_proj.weight")
                parts = fused.split([len(fused) - 2 * key_rows, key_rows, key_rows])
                state |= {f"{mixer}{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
                gate_up = state.pop(f"{mlp}gate_up_proj.weight")
            else:
                gate_up = torch.cat([state.pop(f"{mlp}{name}.weight") for name in ("gate_proj", "up_proj")])
            state[f"{shared}input_linear.weight"] = gate_up
            state[f"{shared}output_linear.weight"] = state.pop(f"{mlp}down_proj.weight")
            if _has_bias(teacher):
                for name in "qkvo":
                    weight = state[f"{mixer}{name}_proj.weight"]
                    state.setdefault(f"{mixer}{name}_proj.bias", weight.new_zeros(len(weight)))
        return state

    def with_layer_types(self, config: PreTrainedConfig, options: list[str]) -> PreTrainedConfig:
        """A copy; any order of layers will do."""
        config = copy.deepcopy(config)
        config.layer_types = [self.options[option] for option in options]
        return config

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """What Granite's own checkpoints say, and engines read: the older words for layers, and rope as it was named.

        transformers reads both. llama.cpp's converter takes every layer for Mamba where it finds the newer words, and
        SGLang refuses them; it also looks for `rope_theta` and `rope_scaling` instead of `rope_parameters`.
        """
        rope = values["rope_parameters"]
        older = {"layer_types": [_OLDER_WORDS.get(word, word) for word in values["layer_types"]]}
        scaling = {} if rope["rope_type"] == "default" else {"rope_scaling": rope}
        return {**values, **older, "rope_theta": rope["rope_theta"], **scaling}

    def attention_name(self, option: str) -> str:
        """Granite's decoder layer holds one of the two."""
        return {FULL: "self_attn", LINEAR: "mamba"}[option]

    def make_branch(self, config: PreTrainedConfig, layer: int, option: str, attention: nn.Module) -> nn.Module:
        """transformers' own Mamba2."""
        config = self.with_layer_types(config, [option] * config.num_hidden_layers)
        return GraniteMoeHybridMambaLayer(cast(Any, config), layer)

    def run_branch(self, branch: Any, option: str, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Attention gets everything its decoder layer passes; Mamba2 where documents begin, if anything."""
        if option == FULL:
            return branch(hidden_states=hidden, **arguments)[0]
        return branch(hidden_states=hidden, **boundaries_in(arguments))

    def takes_boundaries(self, device: torch.device) -> bool:
        """Never: this class makes its attention mask without positions, so its full layers would look across.

        Only variable-length flash attention is told by `cu_seq_lens_*` instead, and Mamba2's kernels by `seq_idx`.
        """
        return False

    @torch.no_grad()
    def initialise(self, branch: Any, attention: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Mamba2 that starts as the linear form of this attention: C from queries, B from keys, x from values.

        So MambaInLlama starts it (arXiv 2408.15237, section 3). Each head of the attention leads a group of Mamba heads
        that share its queries and keys; the surplus heads, also those of surplus groups, hold values of the same heads
        and look back a quarter as far. Convolution, decay, the gate `z` and one scale a head are as in the Gated
        DeltaNet branch; biases of queries, keys and values go into the convolution's.
        """
        heads, head_dim, groups = attention.config.num_attention_heads, attention.head_dim, branch.n_groups
        per_group, shared = branch.num_heads // groups, attention.num_key_value_groups
        leader = torch.arange(groups, device=hidden.device) % heads
        source = leader.repeat_interleave(per_group)
        number = torch.arange(branch.num_heads, device=hidden.device)
        surplus = (number % per_group != 0) | (number >= heads * per_group)
        parts = [
            _heads(attention.v_proj, source // shared, head_dim),
            _heads(attention.k_proj, leader // shared, head_dim),
            _heads(attention.q_proj, leader, head_dim),
        ]
        mixed, bias = (torch.cat(each) for each in zip(*parts, strict=True))
        spread = F.linear(hidden, mixed).flatten(0, 1).std(0).clamp_min(1e-6)
        scale = _TAP / spread.unflatten(0, (-1, head_dim)).mean(1).repeat_interleave(head_dim)
        gate = constant_row(hidden, _GATE).expand(branch.intermediate_size, -1)
        steps = torch.zeros_like(branch.in_proj.weight[: branch.num_heads])
        branch.in_proj.weight.copy_(torch.cat([gate, mixed, steps]))
        branch.conv1d.weight.zero_()
        branch.conv1d.weight[:, 0, -1] = scale
        branch.conv1d.bias.copy_(bias * scale)
        # A step of softplus(0) = ln 2 and a rate of 1 / distance: half is forgotten at that distance.
        distance = mean_distance(attention, hidden, arguments)[source]
        branch.dt_bias.zero_()
        branch.A_log.copy_(-torch.where(surplus, distance * _SURPLUS_DISTANCE, distance).log())
        branch.D.zero_()
        branch.norm.weight.fill_(1.0)
        branch.out_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, head_dim))[:, source].flatten(1))
        target = self.run_branch(attention, FULL, hidden, arguments)
        fit_head_scales(branch.out_proj, head_dim, lambda: branch(hidden_states=hidden), target)

    def share_run(self, config: PreTrainedConfig, name: str) -> float:
        """Every weight is run."""
        return 1.0

    def cache_bytes(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Keys and values; or the convolution's inputs and the recurrent state, which is kept in float32."""
        if option == FULL:
            return attention_cache_bytes(config, context)
        inner = config.mamba_n_heads * config.mamba_d_head
        convolved = inner + 2 * config.mamba_n_groups * config.mamba_d_state
        return convolved * config.mamba_d_conv * number_bytes(config) + inner * config.mamba_d_state * _FLOAT32_BYTES

    def mixing_operations(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Scores and their weighted sum; or decay, write and query of the state, and the convolution."""
        if option == FULL:
            return attention_operations(config, context)
        inner = config.mamba_n_heads * config.mamba_d_head
        convolved = inner + 2 * config.mamba_n_groups * config.mamba_d_state
        return 5 * inner * config.mamba_d_state + 2 * convolved * config.mamba_d_conv

    def flops_per_token(self, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
        """Attention; Mamba2 in chunks (arXiv 2405.21060, section 6), each head with B and C of its own; a feed-forward.

        PyTorch's reference makes each chunk's first state from those of all chunks; kernels hand it on.
        """
        width, chunk = config.hidden_size, config.mamba_chunk_size
        if part == FEED_FORWARD:
            return feed_forward_products(width, config.shared_intermediate_size)
        if part == FULL:
            return attention_products(config, context)
        heads, head_dim, state = config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state
        inner, chunks = heads * head_dim, math.ceil(context / chunk)
        mixed = inner + 2 * config.mamba_n_groups * state
        into = 2 * width * (inner + mixed + heads)
        scan = chunks * chunk / context * heads * (chunk * (2 * state + 2 * head_dim) + 4 * state * head_dim)
        scan_formula = f"heads · ({chunk} · (2 · state + 2 · head_dim) + 4 · state · head_dim)"
        between, handed_on = 2 * (chunks + 1) ** 2 * inner * state / context, chunks / (chunks + 1) ** 2
        return [
            Products("z, x, B, C, dt", "input", "2 · hidden · (2 · inner + 2 · groups · state + heads)", into),
            Products("convolution", "weights", "2 · kernel · (inner + 2 · groups · state)", 2 * _CONVOLUTION * mixed),
            Products("scan", "state", scan_formula, scan),
            Products("between chunks", "state", "2 · (chunks + 1)² · inner · state / context", between, handed_on),
            Products("out", "weights", "2 · inner · hidden", 2 * inner * width),
        ]


dispatch_by_device(GraniteHybridHost.modelling, GraniteHybridHost.kernels)


def _is_square(config: PreTrainedConfig) -> bool:
    return config.num_attention_heads * head_dim_of(config) == config.hidden_size


def _is_as_in_llama_cpp(config: PreTrainedConfig) -> bool:
    fits = config.rope_parameters["rope_type"] == "default" and config.mamba_expand == 2 and config.vocab_size % 8 == 0
    return fits and _is_square(config) and "linear_attention" in config.layer_types


def _has_bias(config: PreTrainedConfig) -> bool:
    stated = (getattr(config, name, False) for name in ("attention_bias", "attention_out_bias"))
    return config.model_type in _BIASED or any(stated)


def _heads(projection: nn.Linear, numbers: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[heads * head_dim, width]` and biases `[heads * head_dim]` of these heads of a projection."""
    bias = projection.weight.new_zeros(projection.out_features) if projection.bias is None else projection.bias
    weight, bias = (part.unflatten(0, (-1, head_dim))[numbers].flatten(0, 1) for part in (projection.weight, bias))
    return weight, bias
