"""Llama and its relatives in Granite hybrid: grouped-query attention and Mamba2.

The teacher moves exactly, weight by weight: gate and up projection stand on top of each other in one matrix, and
Granite's multipliers are 1, or the teacher's own where it is a Granite.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedConfig, PreTrainedModel

from flashmorph.errors import UserError
from flashmorph.hosts.checks import (
    BIASED,
    LLAMA_SETTINGS,
    ROPE_TYPES,
    refuse_activation,
    refuse_rope,
    refuse_two_factors,
    refuse_windows,
)
from flashmorph.hosts.host import Host, layer_prefixes, split_joint
from flashmorph.hosts.serving import READ, RUN, RUN_ON_CPU, TRANSFORMERS, Engine, Gguf
from flashmorph.mixers import LAYER_TYPES, LINEAR, FullAttention, Mamba2, Mixer, Products
from flashmorph.mixers.products import feed_forward_products, head_dim_of
from flashmorph.plan import FULL

_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
_OLDER_WORDS = {"full_attention": "attention", "linear_attention": "mamba"}
_CONVOLUTION = 4
_SQUARE = "heads × head_dim = hidden size"
# llama.cpp takes a Granite hybrid for one without rope, and its context for boundless, unless the file has both fields.
_GGUF = Gguf(
    lambda fields: [heads == 0 for heads in fields["attention.head_count_kv"]],
    fields=lambda config: {
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
        "context_length": config.max_position_embeddings,
    },
)


class GraniteHybridHost(Host):
    """Llama-shaped teachers in `GraniteMoeHybridForCausalLM` (`granitemoehybrid`), without experts."""

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
    # Its class makes the attention mask without positions: full layers would look across documents in a row.
    mixers: Mapping[str, Mixer] = {FULL: FullAttention(varlen=False), LINEAR: Mamba2()}
    settings: Mapping[str, str] = {
        "mamba_expand": "width of Mamba2 over the hidden size, 2 or 1: smaller layers with 1, llama.cpp only with 2",
        "mamba_groups": "groups of Mamba2 heads that share keys and queries, from the teacher's key-value heads on",
    }
    engines: tuple[Engine, ...] = (
        TRANSFORMERS,
        Engine(
            "vLLM",
            "0.32",
            RUN_ON_CPU,
            takes="on a CPU start it with --no-enable-prefix-caching: its Mamba2 there fails without",
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

    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse windows, layers without RoPE, biases in the MLP, and what Granite hybrid computes otherwise.

        Of Phi-3 also two lists of rope factors, between which its class starts anew in `generate`.
        """
        refuse_windows(teacher, self.name)
        if 0 in (getattr(teacher, "no_rope_layers", None) or []):
            raise UserError(
                f"the teacher has layers without RoPE (no_rope_layers); {self.name} has RoPE in all layers or in none"
            )
        refuse_rope(teacher, self.name, ROPE_TYPES)
        refuse_two_factors(teacher, self.name)
        refuse_activation(teacher, self.name)
        if getattr(teacher, "mlp_bias", False):
            raise UserError(f"the teacher's MLP has biases (mlp_bias); {self.name} has none there")

    def config(
        self,
        teacher: PreTrainedConfig,
        mamba_expand: Literal[1, 2] = 2,
        mamba_groups: Annotated[int | None, Field(gt=0)] = None,
    ) -> GraniteMoeHybridConfig:
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
            layer_types=[LAYER_TYPES[FULL]] * teacher.num_hidden_layers,
            mamba_expand=mamba_expand,
            mamba_n_heads=mamba_heads,
            mamba_n_groups=_groups(teacher, mamba_heads, mamba_groups),
            mamba_d_head=head_dim,
            mamba_d_state=head_dim,
            mamba_d_conv=_CONVOLUTION,
            dtype=teacher.dtype,
        )

    def state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights under the host's names, none of them changed; a bias that it lacks is zero."""
        state = dict(state)
        key_rows = teacher.num_key_value_heads * head_dim_of(teacher)
        for layer in layer_prefixes(state):
            mixer, mlp, shared = (f"{layer}{name}." for name in ("self_attn", "mlp", "shared_mlp"))
            split_joint(state, mixer, key_rows)
            if f"{mlp}gate_up_proj.weight" in state:
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

    def serialise(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of Granite's own checkpoints, which engines read: the older words for layers and rope.

        transformers reads both. llama.cpp's converter takes every layer for Mamba where it finds the newer words, and
        SGLang refuses them; it also looks for `rope_theta` and `rope_scaling` instead of `rope_parameters`.
        """
        rope = values["rope_parameters"]
        older = {"layer_types": [_OLDER_WORDS.get(word, word) for word in values["layer_types"]]}
        scaling = {} if rope["rope_type"] == "default" else {"rope_scaling": rope}
        return {**values, **older, "rope_theta": rope["rope_theta"], **scaling}

    def slot(self, option: str) -> str:
        """Granite's decoder layer holds one of the two."""
        return {FULL: "self_attn", LINEAR: "mamba"}[option]

    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """A gated feed-forward: the expert that all tokens share."""
        return feed_forward_products(config.hidden_size, config.shared_intermediate_size)


def _groups(teacher: PreTrainedConfig, mamba_heads: int, groups: int | None) -> int:
    """Groups of Mamba heads; without a number the fewest that give each head of the attention one.

    Raises:
        UserError: these groups cannot be made of the teacher's heads.
    """
    heads, key_values = teacher.num_attention_heads, teacher.num_key_value_heads
    most = next(number for number in range(heads, mamba_heads + 1) if mamba_heads % number == 0)
    shared = [n for n in range(key_values, heads, key_values) if heads % n == 0 and mamba_heads % n == 0]
    if groups not in (None, *shared, most):
        listed = ", ".join(map(str, [*shared, most]))
        raise UserError(f"host.mamba_groups={groups} cannot be made of the teacher's heads; these can: {listed}")
    return groups or most


def _is_square(config: PreTrainedConfig) -> bool:
    return config.num_attention_heads * head_dim_of(config) == config.hidden_size


def _is_as_in_llama_cpp(config: PreTrainedConfig) -> bool:
    fits = config.rope_parameters["rope_type"] == "default" and config.mamba_expand == 2 and config.vocab_size % 8 == 0
    return fits and _is_square(config) and "linear_attention" in config.layer_types


def _has_bias(config: PreTrainedConfig) -> bool:
    stated = (getattr(config, name, False) for name in ("attention_bias", "attention_out_bias"))
    return config.model_type in BIASED or any(stated)
