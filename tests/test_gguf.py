"""GGUF files as teachers: written here from random models, opened again into the same model or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import LLAMA3, YARN, random_teacher
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel

from flashmorph.convert.gguf import checkpoint_of, origin_of
from flashmorph.convert.load import load_model
from flashmorph.convert.teacher import open_teacher
from flashmorph.errors import UserError

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint_of.cache_clear()
    return tmp_path / "cache"


def made(kind: str, **changes) -> PreTrainedModel:
    """A random teacher with the embedded teacher's vocabulary, of widths that divide by a block of 32."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": len(tiny_tokenizer()), "head_dim": 16}
    return random_teacher(f"{kind}: grouped", **{**shape, **changes})


def stored_name(name: str) -> str:
    parts = name.removeprefix("model.").rpartition(".")
    layer = parts[0].split(".", 2)
    inside = layer[2] if layer[0] == "layers" else parts[0]
    return (f"blk.{layer[1]}." if layer[0] == "layers" else "") + f"{NAMES[inside]}.{parts[2]}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: pairs beside each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def written(
    model: PreTrainedModel, file: Path, quantised: str = "F32", fields=None, tensors=None, pre: str = "gpt-2"
) -> Path:
    """What llama.cpp's converter writes of this model."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("random")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (fields or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"] | {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(tiny_tokenizer().eos_token_id)
    kind = getattr(gguf.GGMLQuantizationType, quantised)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if family == "llama" and (heads := {"q": config.num_attention_heads, "k": config.num_key_value_heads}):
            for letter, number in heads.items():
                if f"{letter}_proj" in name:
                    values = permuted(values, number)
        if values.ndim > 1 and quantised != "F32":
            writer.add_tensor(stored_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored_name(name), values)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def frequencies(model: PreTrainedModel) -> np.ndarray:
    """What llama.cpp's converter writes of rope type `llama3`: by how much each frequency is divided."""
    width = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** (-np.arange(0, width, 2) / width)
    return (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


def same_logits(model: PreTrainedModel, folder: Path, within: float = 1e-4) -> None:
    ids = torch.randint(len(tiny_tokenizer()), (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (each(ids).logits for each in (load_model(folder, torch.float32), model))
    assert (found - expected).abs().max() <= within * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_file_opens_into_the_model_that_it_was_made_of(family, tmp_path):
    model = made(family)
    teacher = open_teacher(str(written(model, tmp_path / "teacher.gguf")))
    same_logits(model, teacher.folder)
    assert "from F32" in teacher.note and str(teacher.folder) in teacher.note
    text, expected = "The key of amber-17 is 20931.\nWhat?", tiny_tokenizer()
    expected.backend_tokenizer.normalizer = None
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert teacher.tokenizer()(text)["input_ids"] == expected(text)["input_ids"]


def test_quantised_matrices_become_bfloat16_and_it_says_so(tmp_path):
    model = made("llama")
    folder = checkpoint_of(written(model, tmp_path / "teacher.gguf", "Q8_0"))
    assert origin_of(folder) == "dequantised Q8_0"
    assert {weight.dtype for weight in load_model(folder, "auto").parameters()} == {torch.bfloat16}
    same_logits(model, folder, 0.1)


def test_it_is_opened_once(tmp_path):
    file = written(made("llama"), tmp_path / "teacher.gguf")
    folder = checkpoint_of(file)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    checkpoint_of.cache_clear()
    assert checkpoint_of(file) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("original, factor, high", [(64, 8.0, 4.0), (8192, 32.0, 4.0), (100, 4.0, 3.0)])
def test_frequencies_of_llama_3_come_back(original, factor, high, tmp_path):
    rope = {**LLAMA3, "original_max_position_embeddings": original, "factor": factor, "high_freq_factor": high}
    model = made("llama", rope_parameters=rope, head_dim=64, hidden_size=256)
    file = written(model, tmp_path / "teacher.gguf", tensors={"rope_freqs.weight": frequencies(model)})
    folder = checkpoint_of(file)
    assert load_model(folder, "auto").config.rope_parameters["rope_type"] == "llama3"
    same_logits(model, folder)


def test_yarn_comes_back(tmp_path):
    model = made("qwen3", rope_parameters=YARN)
    fields = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": float(YARN["factor"]),
        "qwen3.rope.scaling.original_context_length": YARN["original_max_position_embeddings"],
    }
    same_logits(model, checkpoint_of(written(model, tmp_path / "teacher.gguf", fields=fields)))


STRANGE = np.linspace(1, 3, 8, dtype=np.float32)
REFUSED = {
    "a scaling that there is not": ({"fields": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type=longrope"),
    "a key of it": (
        {"fields": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 2.0}},
        "rope.scaling.attn_factor=2.0",
    ),
    "frequencies of no kind": ({"tensors": {"rope_freqs.weight": STRANGE}}, "frequencies in rope_freqs.weight"),
    "a tensor": (
        {"tensors": {"blk.0.attn_sinks.weight": STRANGE}},
        "a tensor that LlamaForCausalLM does not use: blk.0.attn_sinks.weight",
    ),
    "a window": ({"fields": {"llama.attention.sliding_window": 64}}, "attention.sliding_window=64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_dropped_is_refused_by_name(name, tmp_path, cache):
    extra, said = REFUSED[name]
    file = written(made("llama"), tmp_path / "teacher.gguf", **extra)
    with pytest.raises(UserError, match=said):
        checkpoint_of(file)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "pre, pieces", [("smollm", ["2", "0", "9", "3", "1"]), ("llama-bpe", ["209", "31"]), ("gpt-2", ["20931"])]
)
def test_numbers_are_cut_as_the_file_says(pre, pieces, tmp_path):
    folder = checkpoint_of(written(made("llama"), tmp_path / "teacher.gguf", pre=pre))
    split = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("20931")] == pieces


def test_a_split_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer.ggml.pre=default: how it splits text is not known"):
        checkpoint_of(written(made("llama"), tmp_path / "teacher.gguf", pre="default"))


def test_a_damaged_file_is_one_sentence(tmp_path, capsys):
    whole = written(made("llama"), tmp_path / "teacher.gguf").read_bytes()
    for size in (0, 3, 100, len(whole) // 2):
        cut = tmp_path / f"{size}.gguf"
        cut.write_bytes(whole[:size])
        assert run_command("estimate", cut) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and str(cut) in printed.replace("\n", "") and "Traceback" not in printed


def test_the_whole_path_takes_one_and_the_card_says_where_it_came_from(tmp_path, recipe_file):
    file = written(made("llama"), tmp_path / "teacher.gguf", "Q8_0")
    assert run_command("morph", file, "--recipe", recipe_file, "--layers", "0", "--output", tmp_path / "run") == 0
    assert "dequantised Q8_0" in (tmp_path / "run" / "README.md").read_text()
    record = json.loads(next((tmp_path / "run" / "stages").glob("transplant-*/stage.json")).read_text())
    assert record["teacher_weights"] == "dequantised Q8_0"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == tiny_tokenizer().eos_token
