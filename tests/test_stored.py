"""What a checkpoint's files hold is what is computed, or it is said what is not."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import random_teacher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_config, load_model
from flashmorph.convert.save import save_model
from flashmorph.convert.streamed import transplant_checkpoint
from flashmorph.errors import UserError

LAYER, PROJECTION = "model.layers.1.", "model.layers.1.self_attn.q_proj.weight"


def saved(folder: Path, name: str = "llama: grouped", dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    random_teacher(name, 3, **changes).to(dtype).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> Path:
    """The checkpoint with other weights: `change` gets them by name and returns what is stored."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def with_more(folder: Path, **more: torch.Tensor) -> Path:
    return rewrite(folder, lambda state: {**state, **more})


def moved(source: Path, target: Path, **options):
    target.mkdir()
    return transplant_checkpoint(source, target, **options)[1]


def assert_refused_both_ways(source: Path, target: Path, problem: str) -> str:
    """A folder is refused, in the same words, by the move and where a model is opened whole."""
    with pytest.raises(UserError, match=problem) as refusal:
        moved(source, target)
    assert not list(target.iterdir())
    with pytest.raises(UserError) as other:
        load_model(source, torch.float32)
    assert str(other.value) == str(refusal.value) and "\n" not in str(refusal.value)
    assert str(source) in str(refusal.value)
    return str(refusal.value)


def as_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Projections in eight bits with a scale for each row beside them, as quantisers write them."""
    found = dict(state)
    for name, weight in state.items():
        if "_proj" in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 448
            found[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            found[f"{name}_scale"] = scale
    return found


FORMS = {
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "F8_E4M3"),
    "another float8": (lambda weight: weight.to(torch.float8_e5m2), "F8_E5M2"),
    "int8": (lambda weight: weight.to(torch.int8), "I8"),
    "packed": (lambda weight: weight.to(torch.int32), "I32"),
    "bytes": (lambda weight: weight.to(torch.uint8), "U8"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_in_a_form_that_is_not_computed_with_is_refused(form, tmp_path):
    cast, dtype = FORMS[form]
    source = rewrite(saved(tmp_path / "teacher"), lambda state: {**state, PROJECTION: cast(state[PROJECTION])})
    says = assert_refused_both_ways(source, tmp_path / "host", "stores 1 weights as")
    assert dtype in says and PROJECTION in says


def test_projections_in_eight_bits_are_not_read_without_their_scales(tmp_path):
    source = rewrite(saved(tmp_path / "teacher"), as_fp8)
    assert "stores 14 weights as F8_E4M3" in assert_refused_both_ways(source, tmp_path / "host", "--allow-unused")
    found = moved(source, tmp_path / "again", allow_unused=True)
    numbers, names = found.notices
    assert "plain numbers, without any scale" in numbers and "leaves them out" in names and " 14 weights" in names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_of_sixteen_bits_and_more_are_taken(dtype, tmp_path):
    source = saved(tmp_path / "teacher", dtype=dtype)
    assert moved(source, tmp_path / "host").notices == ()
    assert {weight.dtype for weight in load_file(tmp_path / "host" / "model.safetensors").values()} == {dtype}


UNUSED = {
    "a bias": (f"{LAYER}self_attn.q_proj.bias", "attention_bias"),
    "a bias of the MLP": (f"{LAYER}mlp.up_proj.bias", "mlp_bias"),
    "a scale": (f"{LAYER}self_attn.q_proj.weight_scale", "quantised"),
    "an inverse scale": (f"{LAYER}mlp.down_proj.weight_scale_inv", "quantised"),
    "a norm": (f"{LAYER}self_attn.q_norm.weight", "--allow-unused"),
    "a norm behind": (f"{LAYER}post_feedforward_layernorm.weight", "--allow-unused"),
    "an adapter": (f"{LAYER}self_attn.q_proj.lora_A.default.weight", "merge it first"),
    "a bias of the last norm": ("model.norm.bias", "--allow-unused"),
    "a bias of the head": ("lm_head.bias", "--allow-unused"),
    "an adapter of the embedding": ("model.embed_tokens.lora_embedding_A.default", "merge it first"),
    "a norm of the embedding": ("model.embedding_norm.weight", "--allow-unused"),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_weight_of_a_used_part_that_nothing_takes_is_refused(kind, tmp_path):
    name, hint = UNUSED[kind]
    source = with_more(saved(tmp_path / "teacher"), **{name: torch.ones(4), "mtp.fc.weight": torch.ones(4)})
    says = assert_refused_both_ways(source, tmp_path / "host", "holds 1 weights that LlamaForCausalLM does not take")
    assert name in says and hint in says
    found = moved(source, tmp_path / "again", allow_unused=True)
    assert [name in notice for notice in found.notices] == [True, False]
    told: list[str] = []
    load_model(source, torch.float32, None, told.append, allow_unused=True)
    assert tuple(told) == found.notices


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.2.self_attn.q_proj.weight", "model.layers.3.embed_tokens.weight"],
        ["mtp.layers.0.self_attn.q_proj.weight", "mtp.norm.weight"],
        ["vision_tower.encoder.layers.1.mlp.fc1.weight"],
        ["model.visual.blocks.0.attn.qkv.weight", "model.visual.patch_embed.proj.weight"],
        ["v_head.summary.weight", "score.weight"],
    ],
)
def test_parts_that_are_not_used_are_told_in_one_line(names, tmp_path):
    source = with_more(saved(tmp_path / "teacher"), **{name: torch.ones(4).to(torch.int8) for name in names})
    (notice,) = moved(source, tmp_path / "host").notices
    assert f" {len(names)} weights" in notice and any(name in notice for name in names)
    told: list[str] = []
    load_model(source, torch.float32, None, told.append)
    assert told == [notice]


def test_rotary_frequencies_and_a_tied_head_are_nothing_unused(tmp_path):
    source = saved(tmp_path / "teacher")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    with_more(
        source, **frequencies, **{"model.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": embedding.clone()}
    )
    assert moved(source, tmp_path / "host").notices == ()


def test_a_head_that_is_tied_by_name_only_is_refused_everywhere(tmp_path):
    source = saved(tmp_path / "teacher")
    with_more(source, **{"lm_head.weight": torch.ones(97, 32, dtype=torch.bfloat16)})
    assert_refused_both_ways(source, tmp_path / "host", "has a head of its own")


def test_a_weight_under_two_names_is_refused(tmp_path):
    """The names of the decoder alone are taken as well: then only one of the two is read."""
    source = with_more(saved(tmp_path / "teacher"), **{"norm.weight": torch.ones(32)})
    assert_refused_both_ways(source, tmp_path / "host", "stores model.norm.weight twice")


def test_names_of_the_decoder_alone_are_taken(tmp_path):
    source = saved(tmp_path / "teacher")
    rewrite(source, lambda state: {name.removeprefix("model."): weight for name, weight in state.items()})
    assert moved(source, tmp_path / "host").notices == ()
    with_more(source, **{"layers.1.self_attn.q_proj.bias": torch.ones(64)})
    assert_refused_both_ways(source, tmp_path / "again", "holds 1 weights")


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts in one tensor for each layer, as the class holds them."""
    model = random_teacher("qwen3_moe: grouped", 3).to(torch.bfloat16)
    return {name: weight.clone() for name, weight in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("change", [dict, fused], ids=["apart", "joined"])
def test_experts_are_taken_as_they_are_stored(change, tmp_path):
    source = rewrite(saved(tmp_path / "teacher", "qwen3_moe: grouped"), change)
    assert moved(source, tmp_path / "host").notices == ()
    with_more(source, **{"model.layers.0.mlp.experts.0.gate_proj.weight_scale": torch.ones(1)})
    assert_refused_both_ways(source, tmp_path / "again", "gate_proj.weight_scale")


WRAPPED = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "merge the adapter",
    "_forward_module.": "Lightning",
    "student.": "no model of transformers",
    "module._orig_mod.": "save the model that is inside",
}


@pytest.mark.parametrize("prefix", WRAPPED)
def test_names_in_a_wrapper_say_what_they_are(prefix, tmp_path):
    source = saved(tmp_path / "teacher")
    rewrite(source, lambda state: {prefix + name: weight for name, weight in state.items()})
    says = assert_refused_both_ways(source, tmp_path / "host", "have a wrapper's names")
    assert WRAPPED[prefix] in says and prefix in says


@pytest.mark.parametrize("inside", ["_orig_mod", "_fsdp_wrapped_module", "base_layer"])
def test_names_with_a_wrapper_inside_say_what_they_are(inside, tmp_path):
    source = saved(tmp_path / "teacher")
    rewrite(source, lambda state: {name.replace("q_proj.", f"q_proj.{inside}."): each for name, each in state.items()})
    assert inside in assert_refused_both_ways(source, tmp_path / "host", "have a wrapper's names")


def test_the_commands_tell_or_refuse_and_an_option_decides(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    source = saved(tmp_path / "teacher", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    with_more(source, **{UNUSED["a bias"][0]: torch.ones(64)})
    for command in (["transplant", source, "-o", tmp_path / "host"], ["generate", source, "--prompt", "a b"]):
        assert run_command(*command) == 2
        refusal = " ".join(capsys.readouterr().err.split())
        assert "--allow-unused" in refusal
        assert run_command(*command, "--allow-unused") == 0
        assert "what is computed leaves them out" in " ".join(capsys.readouterr().err.split())


def without(folder: Path, *keys: str, **values) -> Path:
    path = folder / "config.json"
    found = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
    path.write_text(json.dumps({**found, **values}))
    return folder


@pytest.mark.parametrize("values", [{}, {"dtype": None}, {"torch_dtype": "float8_e4m3fn"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_configuration_without_a_dtype_means_the_one_that_is_stored(values, dtype, tmp_path):
    source = without(saved(tmp_path / "teacher", dtype=dtype), "dtype", **values)
    rewrite(source, lambda state: {**state, "model.norm.weight": state["model.norm.weight"].double()})
    assert load_config(source).dtype == dtype and load_model(source, "auto").dtype == dtype
    moved(source, tmp_path / "host")
    assert {weight.dtype for weight in load_file(tmp_path / "host" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "host" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_older_word_for_a_dtype_is_read(tmp_path):
    source = without(saved(tmp_path / "teacher", dtype=torch.float32), "dtype", torch_dtype="bfloat16")
    assert load_config(source).dtype == torch.bfloat16


@pytest.mark.parametrize("pad", [97, 98, -1, -98])
@pytest.mark.parametrize("name", ["llama: grouped", "qwen3: grouped"])
def test_a_pad_token_outside_the_vocabulary_is_none(name, pad, tmp_path):
    source = without(saved(tmp_path / "teacher", name), pad_token_id=pad)
    assert load_model(source, torch.float32).model.embed_tokens.padding_idx is None
    moved(source, tmp_path / "host")
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    assert host.config.pad_token_id is None and host.model.embed_tokens.padding_idx is None


@pytest.mark.parametrize(
    "values", [{"pad_token_id": -1}, {"pad_token_id": 97}, {"temperature": 0.5, "do_sample": False}]
)
def test_what_transformers_reads_of_generation_but_does_not_save_travels_as_it_is(values, tmp_path):
    source = saved(tmp_path / "teacher")
    (source / "generation_config.json").write_text(json.dumps(values))
    model, _ = transplant(load_model(source, torch.float32))
    save_model(model, tmp_path / "host", source)
    assert json.loads((tmp_path / "host" / "generation_config.json").read_text()) == values


@pytest.mark.parametrize(
    "values", [{"pad_token_id": [3]}, {"pad_token_id": "a"}, {"dtype": "bfloat1"}, {"dtype": "auto"}]
)
def test_a_value_that_cannot_be_read_is_one_sentence(values, tmp_path):
    with pytest.raises(UserError, match="cannot be read") as refusal:
        load_config(without(saved(tmp_path / "teacher"), **values))
    says = str(refusal.value)
    assert "\n" not in says and any(word in says for word in ("pad_token_id", "bfloat1", "auto"))


def test_an_adapter_beside_whole_weights_is_not_opened(tmp_path, monkeypatch):
    """Where peft is installed transformers looks for one; here it is made to believe that it is."""
    source = saved(tmp_path / "teacher")
    (source / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "nobody/x"})
    )
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, source / "adapter_model.safetensors")
    for module in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: True)
    told: list[str] = []
    model = load_model(source, torch.float32, None, told.append)
    assert len(told) == 1 and "adapter beside its weights" in told[0]
    assert torch.equal(model.state_dict()[PROJECTION], load_file(source / "model.safetensors")[PROJECTION].float())
    assert moved(source, tmp_path / "host").notices == tuple(told)
