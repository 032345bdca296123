"""What hosts share: the family of a config.json, settings, and checks of parts that they cannot compute exactly."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flashmorph.errors import UserError

LLAMA_SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_dropout pad_token_id "
    "bos_token_id eos_token_id"
).split()
"""Fields that the configurations of a Llama-shaped teacher and of its host share."""
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
"""Rotary embeddings that transformers computes by one code in all Llama-shaped classes."""
_WITHOUT_LIMIT = ("default", "linear")
"""Rotary embeddings that do not depend on max_position_embeddings."""
BIASED = ("qwen2",)
"""Teachers whose queries, keys and values have a bias that their configuration does not mention."""
_DROPPING_CACHE = ("phi3",)
"""Teachers that drop the cache in `generate` where the other list of rope factors begins."""


def family_of(kind: str, values: Mapping[str, Any]) -> str:
    """The `model_type` that transformers' AutoConfig takes a config.json for that names this one and has `values`."""
    return "ministral" if kind == "mistral" and "layer_types" in values else kind


def refuse_windows(config: PreTrainedConfig, host: str) -> None:
    """Refuse layers that do not attend to the whole context.

    A window as long as the longest context is none.

    Raises:
        UserError: names the kind of layer, or the window.
    """
    window = getattr(config, "sliding_window", None)
    narrow = window is not None and window < config.max_position_embeddings
    types = set(getattr(config, "layer_types", None) or [])
    others = types - {"full_attention"} - (set() if narrow else {"sliding_attention"})
    way_out = _shorter(config) if narrow and others <= {"sliding_attention"} else ""
    if others:
        raise UserError(
            f"the teacher has layers of type {', '.join(sorted(others))}; "
            f"{host} can hold full attention only, so the move would not be exact{way_out}"
        )
    if narrow and not types:
        raise UserError(
            f"the teacher attends through a sliding window of {window:,} tokens (its limit is "
            f"{config.max_position_embeddings:,}); {host} can hold full attention only, so the move would not be exact"
            f"{way_out}"
        )


def _shorter(config: PreTrainedConfig) -> str:
    """A limit within which no window is ever active, since a window counts the token itself.

    Empty where the rotary embedding depends on the limit.
    """
    if config.rope_parameters["rope_type"] not in _WITHOUT_LIMIT:
        return ""
    return (
        f"; set max_position_embeddings to {config.sliding_window} in the config.json of a copy of it, which computes "
        "the same up to there and never needs the window"
    )


def refuse_rope(config: PreTrainedConfig, host: str, known: Sequence[str]) -> None:
    """Refuse rotary embeddings of a type that the host does not compute alike, or of a part of each head.

    Raises:
        UserError: names the type, or the part.
    """
    rope = config.rope_parameters
    if rope["rope_type"] not in known:
        raise UserError(f"the teacher's rope type {rope['rope_type']!r} is not exact in {host}; {tuple(known)} are")
    part = rope.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise UserError(f"the teacher rotates {part:.0%} of each head (partial_rotary_factor); {host} rotates all")


def refuse_two_factors(config: PreTrainedConfig, host: str) -> None:
    """Refuse two lists of rope factors, of a class that reads the text again where the second one begins.

    There Phi-3's own class drops its cache in `generate` and computes all of it with the other factors; a host goes on
    with what is cached, and answers otherwise from there on. Factors that are the same, or a switch that lies not
    below the teacher's limit, change nothing.

    Raises:
        UserError: names the length at which the lists change.
    """
    rope, limit = config.rope_parameters, config.max_position_embeddings
    if config.model_type not in _DROPPING_CACHE:
        return
    if rope["rope_type"] != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return
    if (switch := rope["original_max_position_embeddings"]) < limit:
        scale = ROPE_INIT_FUNCTIONS["longrope"](copy.deepcopy(config), torch.device("cpu"))[1]
        raise UserError(
            f"the teacher has two lists of rope factors (longrope), which change at {switch:,} of {limit:,} tokens: in "
            f"generation its class then reads the whole text again, {host} does not, so answers would differ from "
            f"there on; set max_position_embeddings to {switch} in the config.json of a copy of it, and there "
            f"attention_factor in rope_scaling to {scale!r}, which would follow from the limit: the copy computes the "
            "same up to there"
        )


def refuse_activation(config: PreTrainedConfig, host: str) -> None:
    """Refuse activations other than SiLU.

    Raises:
        UserError: names the activation.
    """
    if config.hidden_act != "silu":
        raise UserError(f"the teacher's activation {config.hidden_act!r} is not exact in {host}; silu is")
