"""A teacher moves into its host without changing what it computes, or is refused."""

import copy
import json
import math

import pytest
import torch
from conftest import random_qwen3
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, Qwen3_5ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flashmorph.errors import UserError
from flashmorph.hosts.qwen3_5 import Qwen35Host
from flashmorph.move import probe, round_both, transplant
from flashmorph.publish import save_model
from flashmorph.teacher import load_model, open_teacher

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8, "hidden_size": 48},
    "bias": {"attention_bias": True, "tie_word_embeddings": False},
    "yarn": {"rope_parameters": YARN},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 48,
    },
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}},
}


def some_tokens(rows: int = 2, length: int = 100) -> torch.Tensor:
    """Longer than the probe, and than some teachers' rope was made for."""
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def divergence(exact: torch.Tensor, model, ids: torch.Tensor) -> float:
    """Mean KL to the exact logits, a token."""
    wanted, found = exact.log_softmax(-1), logits(model, ids).float().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def in_bfloat16(teacher, ids: torch.Tensor, folder) -> float:
    """How many times further from the float32 teacher the saved host is than the teacher's own bfloat16 version."""
    model, _ = transplant(teacher)
    exact = logits(teacher, ids)
    teacher.to(torch.bfloat16).save_pretrained(folder / "teacher")
    save_model(model, folder / "host", folder / "teacher")
    again = [AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto") for name in ("teacher", "host")]
    assert {model.dtype for model in again} == {torch.bfloat16}
    own, moved = (divergence(exact, model, ids) for model in again)
    return moved / own


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> dict[str, float]:
    """For each shape the geometric mean of `in_bfloat16` over seeds."""
    ids = some_tokens(4)
    found = {}
    for shape, changes in SHAPES.items():
        ratios = [in_bfloat16(random_qwen3(seed, **changes), ids, tmp_path_factory.mktemp("bf16")) for seed in range(3)]
        found[shape] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_host_computes_what_the_teacher_computes(shape):
    teacher = random_qwen3(3, **SHAPES[shape])
    model, proof = transplant(teacher)
    assert isinstance(model, Qwen3_5ForCausalLM)
    assert 0 <= proof.difference <= proof.tolerance == max(1e-5 * proof.largest_logit, 2 * proof.noise)
    expected = logits(teacher, some_tokens())
    assert expected.std() > 0.1
    allowed = max(1e-5 * expected.abs().max(), 2 * proof.noise)
    assert (logits(model, some_tokens()) - expected).abs().max() <= allowed


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bfloat16_checkpoint_moves_into_weights_that_bfloat16_can_hold(shape):
    """All but the norms that no matrix reads directly: q_norm, k_norm and the last one."""
    teacher = random_qwen3(4, **SHAPES[shape])
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.copy_(weight.bfloat16().float())
    model, proof = transplant(teacher)
    assert proof.difference <= proof.tolerance
    names = [name for name, _ in model.named_parameters() if not name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert any(name.endswith("layernorm.weight") for name in names)
    for name in set(names) - {"model.norm.weight"}:
        weight = model.get_parameter(name)
        assert torch.equal(weight, weight.bfloat16().float()), name


def test_in_bfloat16_the_host_is_as_near_as_the_teacher_itself(noise):
    """Which weights round up is chance: so the mean over all shapes and seeds."""
    assert math.exp(sum(map(math.log, noise.values())) / len(noise)) <= 1.1


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_no_shape_is_much_worse(noise, shape):
    assert noise[shape] <= 1.6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rounding_of_a_run_is_that_of_the_saved_checkpoint(shape, tmp_path):
    """What a run reports, against the folder opened again; the probe batch is the only difference to `noise`."""
    teacher = random_qwen3(1, **SHAPES[shape])
    expected = in_bfloat16(copy.deepcopy(teacher), probe(teacher), tmp_path)
    model, _ = transplant(teacher)
    assert round_both(teacher, model, torch.bfloat16) == pytest.approx(expected, rel=1e-2)
    assert {weight.dtype for weight in [*model.parameters(), *teacher.parameters()]} == {torch.bfloat16}


def test_the_shapes_are_as_different_as_they_claim():
    for shape, expected in (("yarn", 1e-3), ("linear", 1e-3), ("dynamic", 1e-3), ("llama3", 1e-3), ("bias", 1e-3)):
        changes = {**SHAPES[shape], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        changes.pop("attention_bias", None)
        changed = random_qwen3(3, **SHAPES[shape])
        plain = random_qwen3(3, **changes)
        plain.load_state_dict(changed.state_dict(), strict=False)
        assert (logits(changed, some_tokens()) - logits(plain, some_tokens())).abs().max() > expected


def test_a_norm_weight_of_zero_or_below_moves_too():
    teacher = random_qwen3(5)
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if name.endswith("norm.weight"):
                weight[0], weight[1], weight[2] = 0.0, -0.02, -3.0
    model, proof = transplant(teacher)
    assert proof.difference <= proof.tolerance
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_the_teacher_is_left_as_it_was():
    teacher = random_qwen3(6).train()
    teacher.model.layers[0].requires_grad_(False)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    config = teacher.config.to_dict()
    flags = [weight.requires_grad for weight in teacher.parameters()]
    model, _ = transplant(teacher)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(7.0)
    assert before.keys() == teacher.state_dict().keys()
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in teacher.named_buffers())
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}
    assert [weight.requires_grad for weight in teacher.parameters()] == flags
    assert teacher.config.to_dict() == config
    assert teacher.training


def test_embeddings_are_tied_as_they_were():
    for tied in (True, False):
        model, _ = transplant(random_qwen3(0, tie_word_embeddings=tied))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_the_saved_host_keeps_the_tokenizer_and_the_dtype(teacher_folder, tmp_path):
    model, _ = transplant(load_model(teacher_folder, torch.float32))
    save_model(model, tmp_path / "host", teacher_folder)
    written = {path.name for path in (tmp_path / "host").iterdir()}
    assert {path.name for path in teacher_folder.glob("tokenizer*")} <= written
    config = json.loads((tmp_path / "host" / "config.json").read_text())
    assert (config["dtype"], config["layer_types"]) == ("bfloat16", ["full_attention"] * 2)


@pytest.mark.parametrize("spoil", ["a doubled projection", "a norm", "nothing but NaN"])
def test_a_move_that_changes_the_logits_is_refused(monkeypatch, spoil):
    exact = Qwen35Host.host_state

    def spoiled(self, teacher):
        state = exact(self, teacher)
        if spoil == "a doubled projection":
            state["model.layers.1.self_attn.o_proj.weight"] = state["model.layers.1.self_attn.o_proj.weight"] / 2
        elif spoil == "a norm":
            state["model.norm.weight"] = state["model.norm.weight"] + 1e-3
        else:
            state["model.norm.weight"] = state["model.norm.weight"] * math.nan
        return state

    monkeypatch.setattr(Qwen35Host, "host_state", spoiled)
    with pytest.raises(UserError, match="is not exact: logits differ by"):
        transplant(random_qwen3(0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_teacher_with_a_weight_that_is_not_finite_is_refused_by_its_name(value):
    teacher = random_qwen3(0)
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        transplant(teacher)


def test_a_teacher_in_bfloat16_is_refused():
    with pytest.raises(UserError, match="float32"):
        transplant(random_qwen3(0).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_attention"),
        ({"rope_parameters": {**LONG, "original_max_position_embeddings": 64}}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_a_part_without_an_exact_counterpart_is_refused_by_its_name(tmp_path, changes, problem):
    teacher = random_qwen3(0, **changes)
    with pytest.raises(UserError, match=problem):
        transplant(teacher)
    teacher.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=problem):
        open_teacher(str(tmp_path))


@pytest.mark.parametrize("config", [GPT2Config(n_layer=1), OPTConfig(num_hidden_layers=1)], ids=["gpt2", "opt"])
def test_an_architecture_without_a_host_is_refused_with_those_that_have_one(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        open_teacher(str(tmp_path))
    assert config.model_type in str(error.value) and "qwen3" in str(error.value)
    assert "\n" not in str(error.value)


CONFIGS = {
    "no config": None,
    "no JSON": "{",
    "no type": "{}",
    "unknown type": '{"model_type": "perceptron"}',
    "a list": "[]",
    "quantised": json.dumps({**Qwen3Config().to_dict(), "quantization_config": {"quant_method": "fp8"}}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, kind):
    if CONFIGS[kind] is not None:
        (tmp_path / "config.json").write_text(CONFIGS[kind])
    with pytest.raises(UserError) as error:
        open_teacher(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_teacher_that_is_not_there_is_refused(name):
    with pytest.raises(UserError) as error:
        open_teacher(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def half_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


def one_more_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("spoil", [no_weights, pickled_weights, half_the_weights, another_shape, one_more_layer])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, spoil):
    random_qwen3(0).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path, torch.float32), Qwen3ForCausalLM)
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(tmp_path, torch.float32)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_changed_file_makes_another_teacher(tmp_path):
    random_qwen3(0).save_pretrained(tmp_path)
    first = open_teacher(str(tmp_path)).digest
    assert open_teacher(str(tmp_path)).digest == first
    random_qwen3(1).save_pretrained(tmp_path)
    assert open_teacher(str(tmp_path)).digest != first
