"""GGUF files of random models, written as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
import numpy as np
from conftest import tiny_tokenizer
from families import random_teacher
from transformers import PreTrainedModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
}
ARCHITECTURES = {"mistral": "llama", "qwen3_moe": "qwen3moe"}


def made(kind: str, **changes) -> PreTrainedModel:
    """A random teacher with the embedded teacher's vocabulary, of widths that divide by a block of 32."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tiny_tokenizer()), "head_dim": 16}
    if kind in ("qwen2", "phi3"):
        shape["head_dim"] = None
    return random_teacher(f"{kind}: grouped", **{**shape, **changes})


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Weights by llama.cpp's names: heads of a Llama in its order, experts stacked, gate and up apart."""
    config, found = model.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        values, parts = weight.float().numpy(), name.removeprefix("model.").split(".", 2)
        inside, block = (parts[2], f"blk.{parts[1]}.") if parts[0] == "layers" else (".".join(parts), "")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if inside == "mlp.experts.gate_up_proj":
            found[f"{block}ffn_gate_exps.weight"], found[f"{block}ffn_up_exps.weight"] = np.split(values, 2, axis=1)
            continue
        module, _, kind = inside.rpartition(".") if inside.endswith((".weight", ".bias")) else (inside, "", "weight")
        if ARCHITECTURES.get(config.model_type, config.model_type) == "llama":
            for letter, number in heads.items():
                if letter in name:
                    values = permuted(values, number)
        found[f"{block}{NAMES[module]}.{kind}"] = values
    return found


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: pairs beside each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tiny_vocabulary(pre: str = "gpt-2") -> dict[str, object]:
    """The embedded teacher's vocabulary, by the names of its fields."""
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"] | {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "eos_token_id": tiny_tokenizer().eos_token_id,
    }


def written(
    model: PreTrainedModel,
    file: Path,
    quantised: str = "F32",
    fields=None,
    tensors=None,
    vocabulary=None,
    name: str = "random",
    without: str = "",
) -> Path:
    """What llama.cpp's converter writes of this model, but for the field that ends in `without`."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if architecture in ("llama", "phi3"):
        values["rope.dimension_count"] = width
    if getattr(config, "head_dim", None):
        values |= {"attention.key_length": width, "attention.value_length": width}
    if architecture == "phi3":
        values["attention.sliding_window"] = 0
    if architecture == "qwen3moe":
        values |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    values = {f"{architecture}.{key}": value for key, value in values.items()}
    values |= {f"tokenizer.ggml.{key}": value for key, value in (vocabulary or tiny_vocabulary()).items()}
    values |= fields or {}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in values.items():
        if not without or not key.endswith(without):
            add.get(type(value), writer.add_array)(key, value)
    kind = getattr(gguf.GGMLQuantizationType, quantised)
    for key, value in tensors_of(model).items():
        if value.ndim > 1 and quantised != "F32":
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value)
    for key, value in (tensors or {}).items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
