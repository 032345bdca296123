"""GGUF files as teachers: written here from random models, opened again into the same model or refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import LINEAR, LLAMA3, YARN
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Tokenizer

from flashmorph.convert.gguf import checkpoint_of, origin_of
from flashmorph.convert.load import load_model
from flashmorph.convert.teacher import open_teacher
from flashmorph.errors import UserError

pytest.importorskip("gguf")
from gguf_files import made, tiny_vocabulary, written

pytestmark = pytest.mark.usefixtures("cache")


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


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_opens_into_the_model_that_it_was_made_of(family, tied, tmp_path):
    model = made(family, tie_word_embeddings=tied)
    vocabulary = tiny_vocabulary("qwen2" if family == "qwen2" else "gpt-2")
    file = written(model, tmp_path / "teacher.gguf", vocabulary=vocabulary)
    teacher = open_teacher(str(file))
    same_logits(model, teacher.folder)
    assert "from F32" in teacher.note and str(teacher.folder) in teacher.note
    text, expected = "The key of amber-17 is 20931.\nWhat?", tiny_tokenizer()
    expected.backend_tokenizer.normalizer = None
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "qwen2":
        vocab = {token: index for index, token in enumerate(vocabulary["tokens"])}
        expected = Qwen2Tokenizer(vocab, [tuple(merge.split(" ")) for merge in vocabulary["merges"]])
    assert teacher.tokenizer()(text)["input_ids"] == expected(text)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_matrices_in_float16_stay_so(family, tmp_path):
    folder = checkpoint_of(written(made(family), tmp_path / "teacher.gguf", "F16"))
    assert origin_of(folder) == "from F16"
    for name, weight in load_model(folder, "auto").state_dict().items():
        assert torch.equal(weight, made(family).state_dict()[name].half())


def test_what_a_file_may_leave_out(tmp_path):
    for family, left_out in (("llama", "freq_base"), ("llama", "key_length"), ("qwen3", "key_length")):
        model = made(family)
        file = written(model, tmp_path / f"{family}-{left_out}.gguf", without=left_out)
        same_logits(model, checkpoint_of(file))


def test_a_file_may_be_named_mistral(tmp_path):
    model = made("mistral")
    same_logits(model, checkpoint_of(written(model, tmp_path / "teacher.gguf", name="mistral")))


def test_quantised_matrices_become_bfloat16_and_it_says_so(tmp_path):
    model = made("llama")
    folder = checkpoint_of(written(model, tmp_path / "teacher.gguf", "Q8_0"))
    assert origin_of(folder) == "dequantised Q8_0"
    assert {weight.dtype for weight in load_model(folder, "auto").parameters()} == {torch.bfloat16}
    same_logits(model, folder, 0.1)


def test_it_is_opened_once(tmp_path, cache):
    """And again where its checkpoint was removed."""
    file = written(made("llama"), tmp_path / "teacher.gguf")
    folder = checkpoint_of(file)
    weights = folder / "model.safetensors"
    before, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert checkpoint_of(file) == folder and weights.stat().st_mtime_ns == before
    shutil.rmtree(cache)
    assert checkpoint_of(file) == folder and folder.parent == cache / "flashmorph" / "gguf"
    assert weights.read_bytes() == content


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


def test_yarns_own_betas_come_back(tmp_path):
    model = made("qwen3", rope_parameters=YARN | {"beta_fast": 16.0, "beta_slow": 2.0})
    fields = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": float(YARN["factor"]),
        "qwen3.rope.scaling.original_context_length": YARN["original_max_position_embeddings"],
        "qwen3.rope.scaling.yarn_beta_fast": 16.0,
        "qwen3.rope.scaling.yarn_beta_slow": 2.0,
    }
    same_logits(model, checkpoint_of(written(model, tmp_path / "teacher.gguf", fields=fields)))


def test_linear_scaling_comes_back(tmp_path):
    model = made("llama", rope_parameters=LINEAR)
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": LINEAR["factor"]}
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
    "rope of old": ({"fields": {"llama.rope.scale_linear": 4.0}}, "rope.scale_linear=4.0"),
    "a key that changes logits": ({"fields": {"llama.logit_scale": 0.5}}, "llama.logit_scale=0.5, which LlamaFor"),
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
    folder = checkpoint_of(written(made("llama"), tmp_path / "teacher.gguf", vocabulary=tiny_vocabulary(pre)))
    split = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("20931")] == pieces


def test_a_split_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer.ggml.pre=default: how it splits text is not known"):
        checkpoint_of(written(made("llama"), tmp_path / "teacher.gguf", vocabulary=tiny_vocabulary("default")))


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
