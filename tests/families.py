"""A random tiny teacher of every family that has a host, in several shapes."""

import copy
import math

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TOKENS = {"vocab_size": 97, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3["original_max_position_embeddings"] = 64
LONG = {"rope_type": "longrope", "short_factor": [1.0 + step / 8 for step in range(8)], "rope_theta": 1e4}
LONG |= {"long_factor": [4.0 + step for step in range(8)], "original_max_position_embeddings": 64}

ONE_LIST = {**LONG, "long_factor": LONG["short_factor"]}

HIDDEN_64 = {"hidden_size": 64, "head_dim": None}
"""For families that know no head_dim of their own: 64 / 4 heads."""
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.2,
}

FAMILIES = {
    "qwen3": (Qwen3Config, {}),
    "qwen3_moe": (Qwen3MoeConfig, EXPERTS),
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "ministral": (MinistralConfig, {"sliding_window": 512}),
    "qwen2": (Qwen2Config, HIDDEN_64),
    "seed_oss": (SeedOssConfig, {}),
    "granite": (GraniteConfig, {**HIDDEN_64, **GRANITE}),
    "smollm3": (SmolLM3Config, {**HIDDEN_64, "no_rope_layer_interval": 99}),
    "phi3": (Phi3Config, HIDDEN_64),
}
SHAPES = {
    "qwen3": {
        "grouped": {},
        "multi-head": {"num_key_value_heads": 4},
        "multi-query, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
        "wide heads": {"head_dim": 32},
        "narrow heads": {"head_dim": 8, "hidden_size": 48},
        "bias": {"attention_bias": True, "tie_word_embeddings": False},
        "yarn": {"rope_parameters": YARN},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 48},
        "llama3": {"rope_parameters": LLAMA3},
    },
    "qwen3_moe": {
        "grouped": {},
        "bias, untied, llama3": {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
        "multi-query, one expert of two": {"num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1},
    },
    "llama": {
        "grouped": {},
        "bias, untied, llama3": {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
        "surplus groups": {"hidden_size": 160, "head_dim": 32},
        "multi-head, linear": {"num_key_value_heads": 4, "head_dim": 8, "rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 48},
        "longrope": {"rope_parameters": LONG},
    },
    "mistral": {
        "grouped": {},
        "narrow heads, untied": {"head_dim": 8, "hidden_size": 48, "tie_word_embeddings": False},
        "a window of everything": {"sliding_window": 512, "rope_parameters": YARN},
    },
    "ministral": {
        "grouped": {},
        "multi-query, linear": {"num_key_value_heads": 1, "rope_parameters": LINEAR},
        "full by name": {"layer_types": ["full_attention"] * 2, "sliding_window": 16, "tie_word_embeddings": False},
    },
    "qwen2": {
        "grouped": {},
        "multi-query, yarn": {"num_key_value_heads": 1, "rope_parameters": YARN},
        "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    },
    "seed_oss": {
        "grouped": {},
        "bias at the output only": {"attention_bias": False, "attention_out_bias": True},
        "no bias, untied, yarn": {"attention_bias": False, "tie_word_embeddings": False, "rope_parameters": YARN},
    },
    "granite": {
        "grouped": {},
        "bias, untied": {"attention_bias": True, "tie_word_embeddings": False},
        "logits divided by 3": {"logits_scaling": 3.0, "rope_parameters": LINEAR},
    },
    "smollm3": {
        "grouped": {},
        "bias, untied": {"attention_bias": True, "tie_word_embeddings": False},
        "multi-query, yarn": {"num_key_value_heads": 1, "rope_parameters": YARN},
    },
    "phi3": {
        "grouped": {},
        "longrope, one list": {"rope_parameters": ONE_LIST, "original_max_position_embeddings": 64},
        "longrope, the other list beyond its limit": {
            "rope_parameters": LONG,
            "original_max_position_embeddings": 512,
            "num_key_value_heads": 1,
        },
        "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False, "sliding_window": 512},
    },
}
TEACHERS = [f"{family}: {shape}" for family, shapes in SHAPES.items() for shape in shapes]
ONE_OF_EACH_FAMILY = [f"{family}: grouped" for family in FAMILIES]
ONE_FOR_EACH_HOST = ["qwen3: grouped", "qwen3_moe: grouped", "llama: grouped"]


def config_of(teacher: str, **changes):
    """The configuration of `family: shape`, with `changes`; a head_dim of None is left to the family."""
    family, _, shape = teacher.partition(": ")
    config, own = FAMILIES[family]
    # Copied, since configurations write into the parameters of rope that they are given.
    values = copy.deepcopy({**TOKENS, **SHAPE, **own, **SHAPES[family][shape or "grouped"], **changes})
    if values["head_dim"] is None:
        del values["head_dim"]
    return config(**values)


def random_teacher(teacher: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A teacher with random weights, its norm weights log-uniform from 0.01 to 8."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(teacher, **changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(torch.exp(torch.empty_like(weight).uniform_(math.log(0.01), math.log(8))))
            elif weight.ndim == 1:
                weight.normal_(std=0.3)
            else:
                weight.mul_(3)
    return model
