"""A teacher moves into its host without changing what it computes, or is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_qwen3, run_command
from families import DEFAULT, LONG, SHAPES, TEACHERS, YARN, config_of, random_teacher
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, Qwen3Config, Qwen3ForCausalLM

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.save import save_model
from flashmorph.convert.teacher import open_teacher
from flashmorph.errors import UserError
from flashmorph.hosts import host_for
from flashmorph.hosts.qwen3_5 import Qwen35Host
from flashmorph.pipeline.export import lay_out

CHANGED = [name for name in TEACHERS if name.startswith("qwen3")]
"""Teachers some of whose weights are stored otherwise in their host; those of all others are copied."""


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
    """For each teacher the geometric mean of `in_bfloat16` over seeds."""
    ids = some_tokens(4)
    found = {}
    for name in CHANGED:
        ratios = [in_bfloat16(random_teacher(name, seed), ids, tmp_path_factory.mktemp("bf16")) for seed in range(3)]
        found[name] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return found


@pytest.mark.parametrize("name", TEACHERS)
def test_the_host_computes_what_the_teacher_computes(name):
    teacher = random_teacher(name, 3)
    model, proof = transplant(teacher)
    assert isinstance(model, host_for(teacher.config).model_class)
    assert 0 <= proof.difference <= proof.tolerance == max(1e-5 * proof.largest, 2 * proof.noise)
    expected = logits(teacher, some_tokens())
    assert expected.std() > 0.1
    allowed = max(1e-5 * expected.abs().max(), 2 * proof.noise)
    assert (logits(model, some_tokens()) - expected).abs().max() <= allowed


@pytest.mark.parametrize("name", TEACHERS)
def test_the_host_goes_on_as_the_teacher_does(name):
    """In `generate`, with the cache, from below to beyond every length at which some rope changes (48 and 64)."""
    teacher = random_teacher(name, 3)
    host, _ = transplant(teacher)
    found = [
        model.generate(
            some_tokens(2, 40),
            attention_mask=torch.ones(2, 40, dtype=torch.long),
            max_new_tokens=36,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (teacher, host)
    ]
    expected, logits_found = (torch.stack(each.logits) for each in found)
    torch.testing.assert_close(logits_found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(found[1].sequences, found[0].sequences)


def test_a_teacher_that_starts_anew_in_generation_is_seen_to_do_so():
    """What the refusal of two lists of rope factors is about: the teacher is not what a cache would go on with."""
    two = {"rope_parameters": LONG, "original_max_position_embeddings": 64}
    teacher = random_teacher("phi3", 3, **two)
    ids = some_tokens(1, 60)
    made = teacher.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    again = ids
    for _ in range(16):
        again = torch.cat([again, logits(teacher, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, again)
    with pytest.raises(UserError, match="change at 64"):
        host_for(teacher.config)
    assert host_for(config_of("llama: longrope"))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_bfloat16_checkpoint_moves_into_weights_that_bfloat16_can_hold(name):
    """All but the norms that no matrix reads directly: q_norm, k_norm and the last one."""
    teacher = random_teacher(name, 4)
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


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_in_bfloat16_the_host_is_as_near_as_the_teacher_itself(noise, family):
    """Which weights round up is chance: so the mean over a family's shapes and seeds."""
    found = [math.log(ratio) for name, ratio in noise.items() if name.startswith(f"{family}:")]
    assert math.exp(sum(found) / len(found)) <= 1.1


@pytest.mark.parametrize("name", CHANGED)
def test_in_bfloat16_no_teacher_is_much_worse(noise, name):
    assert noise[name] <= 1.6


PLAIN = {"rope_parameters": DEFAULT, "attention_bias": False, "attention_out_bias": False, "logits_scaling": 1.0}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teachers_are_as_different_as_they_claim(name):
    """What a shape changes is seen in the logits, so that equal logits show that it has moved."""
    family, _, shape = name.partition(": ")
    teacher = random_teacher(name, 3)
    for setting in SHAPES[family][shape].keys() & PLAIN.keys():
        if SHAPES[family][shape][setting] != PLAIN[setting]:
            plain = random_teacher(name, 3, **{setting: PLAIN[setting]})
            plain.load_state_dict(teacher.state_dict(), strict=False)
            assert (logits(teacher, some_tokens()) - logits(plain, some_tokens())).abs().max() > 1e-3


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
    exact = Qwen35Host.state

    def spoiled(self, teacher, weights):
        state = exact(self, teacher, weights)
        if spoil == "a doubled projection":
            state["model.layers.1.self_attn.o_proj.weight"] = state["model.layers.1.self_attn.o_proj.weight"] / 2
        elif spoil == "a norm":
            state["model.norm.weight"] = state["model.norm.weight"] + 1e-3
        else:
            state["model.norm.weight"] = state["model.norm.weight"] * math.nan
        return state

    monkeypatch.setattr(Qwen35Host, "state", spoiled)
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


PARTIAL = {**DEFAULT, "partial_rotary_factor": 0.5}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


REFUSED_PARTS = [
    ("qwen3", WINDOWS, "sliding_attention"),
    ("qwen3", {"rope_parameters": LONG}, "longrope"),
    ("qwen3", {"rope_parameters": PARTIAL}, "rotates 50% of each head"),
    ("qwen3", {"hidden_act": "gelu"}, "gelu"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"head_dim": 32}, "4 heads of 32 do not fit into mamba_expand × hidden size = 2 × 32"),
    ("llama", {"hidden_size": 36, "head_dim": 16}, "heads of 16 do not divide mamba_expand × hidden size = 2 × 36"),
    ("mistral", {"sliding_window": 16}, "a sliding window of 16 tokens"),
    ("ministral", {"sliding_window": 16}, "sliding_attention"),
    ("qwen2", WINDOWS, "sliding_attention"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("phi3", {"sliding_window": 16}, "a sliding window of 16 tokens"),
    ("phi3", {"rope_parameters": PARTIAL}, "rotates 50% of each head"),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, "change at 64 of 512 tokens"),
]


@pytest.mark.parametrize(("name", "changes", "problem"), REFUSED_PARTS)
def test_a_part_without_an_exact_counterpart_is_refused_by_its_name(tmp_path, name, changes, problem):
    teacher = random_teacher(name, 0, **changes)
    with pytest.raises(UserError, match=problem) as refusal:
        transplant(teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    assert run_command("transplant", tmp_path / "teacher", "--output", tmp_path / "host") == 2
    assert "\n" not in str(refusal.value) and not (tmp_path / "host").exists()


def changed_copy(teacher: Path, folder: Path, **changes) -> Path:
    """A copy with another config.json, its rope as published ones have it."""
    shutil.copytree(teacher, folder)
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    if values["rope_scaling"]["type"] == "default":
        values["rope_scaling"] = None
    values["rope_scaling"] = {**(values["rope_scaling"] or {}), **changes.pop("rope_scaling", {})} or None
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


@pytest.mark.parametrize("name", ["phi3", "mistral", "ministral", "qwen2", "qwen3"])
def test_a_copy_with_the_window_as_its_limit_computes_the_same_and_is_taken(tmp_path, name):
    """A window counts the token itself: it cuts nothing at its own length, and something one token after it."""
    windows = {**WINDOWS, "max_window_layers": 0} if name in ("qwen2", "qwen3") else {"sliding_window": 16}
    teacher, wide = random_teacher(name, 2, **windows), random_teacher(name, 2)
    if name == "ministral":
        wide.config.layer_types = ["full_attention"] * 2
    ids = some_tokens(2, 17)
    wide.load_state_dict(teacher.state_dict())
    assert torch.equal(logits(teacher, ids[:, :16]), logits(wide, ids[:, :16]))
    assert not torch.allclose(logits(teacher, ids), logits(wide, ids), atol=1e-3)
    with pytest.raises(UserError, match=r"set max_position_embeddings to 16 in the config\.json of a copy"):
        host_for(teacher.config)
    teacher.save_pretrained(tmp_path / "teacher")
    copied = changed_copy(tmp_path / "teacher", tmp_path / "copy", max_position_embeddings=16)
    assert run_command("transplant", copied, "--output", tmp_path / "host") == 0
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    assert host.config.max_position_embeddings == 16
    torch.testing.assert_close(logits(host, ids[:, :16]), logits(teacher, ids[:, :16]), rtol=1e-4, atol=1e-3)


def test_a_window_under_an_embedding_that_depends_on_the_limit_has_no_such_way_out():
    with pytest.raises(UserError, match="sliding window of 16 tokens") as refusal:
        host_for(config_of("mistral", sliding_window=16, rope_parameters=YARN))
    assert "max_position_embeddings" not in str(refusal.value)


def test_a_copy_within_the_first_list_of_rope_factors_computes_the_same_and_is_taken(tmp_path):
    """Its attention_factor would follow from the limit, so both have to be set."""
    two = {"rope_parameters": LONG, "original_max_position_embeddings": 64}
    teacher, ids = random_teacher("phi3", 3, **two), some_tokens(2, 64)
    with pytest.raises(UserError, match="max_position_embeddings to 64 ") as refusal:
        host_for(teacher.config)
    (factor,) = re.findall(r"attention_factor in rope_scaling to ([0-9.]+),", str(refusal.value))
    teacher.save_pretrained(tmp_path / "teacher")
    limit = {"max_position_embeddings": 64}
    for name, scaling, same in (("half", {}, False), ("whole", {"attention_factor": float(factor)}, True)):
        copied = changed_copy(tmp_path / "teacher", tmp_path / name, **limit, rope_scaling=scaling)
        assert run_command("transplant", copied, "--output", tmp_path / f"host of {name}") == 0
        host = AutoModelForCausalLM.from_pretrained(tmp_path / f"host of {name}")
        assert torch.allclose(logits(host, ids), logits(teacher, ids), rtol=1e-4, atol=1e-3) == same


@pytest.mark.parametrize(("name", "changes", "problem"), REFUSED_PARTS)
def test_a_refusal_names_the_other_hosts_that_take_the_teacher(name, changes, problem):
    teacher = random_teacher(name, 0, **changes)
    with pytest.raises(UserError, match=problem) as refusal:
        transplant(teacher)
    for option, settings in (("--window", {"window": 16}), ("--mixers", {"mixers": "full,window", "window": 16})):
        try:
            proof = transplant(teacher, settings)[1]
            taken = proof.difference <= proof.tolerance
        except UserError:
            taken = False
        if option in str(refusal.value):
            assert taken, option
    if name == "smollm3":
        assert "with --window TOKENS it moves into SmolLM3ForCausalLM" in str(refusal.value)
        assert "with --mixers full,window it moves into FlashmorphForCausalLM" in str(refusal.value)


@pytest.mark.parametrize("given", [0, 3, "2", True, None])
def test_an_expansion_that_there_is_not_is_refused(given):
    with pytest.raises(UserError, match="mamba_expand must be 1 or 2"):
        transplant(random_teacher("llama"), {"mamba_expand": given})


def test_settings_that_a_host_does_not_have_are_refused():
    with pytest.raises(UserError, match="no setting 'mamba_expnd'; it has mamba_expand"):
        transplant(random_teacher("llama"), {"mamba_expnd": 1})
    with pytest.raises(UserError, match="no setting 'mamba_expand'; it has key_heads, value_heads"):
        transplant(random_teacher("qwen3"), {"mamba_expand": 1})


def test_config_json_says_what_engines_read(tmp_path):
    """Granite's own words for layers and for rope; transformers reads the same model from them."""
    teacher = random_teacher("llama: bias, untied, llama3")
    model, _ = transplant(teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    save_model(model, tmp_path / "host", tmp_path / "teacher")
    values = json.loads((tmp_path / "host" / "config.json").read_text())
    assert values["layer_types"] == ["attention", "attention"]
    assert values["rope_theta"] == 5e5 and values["rope_scaling"] == values["rope_parameters"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    assert again.config.layer_types == model.config.layer_types == ["full_attention", "full_attention"]
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(again, some_tokens()), logits(model, some_tokens()))


@pytest.mark.parametrize(
    ("name", "settings", "lost"),
    [
        ("llama", {}, {"layer_types", "rope_theta"}),
        ("llama: bias, untied, llama3", {}, {"layer_types", "rope_theta", "rope_scaling"}),
        ("qwen3", {}, set()),
        ("qwen3_moe", {}, set()),
        ("llama", {"window": 16}, set()),
    ],
)
def test_what_engines_read_is_there_again_with_the_hybrid_s_own_config_json(tmp_path, name, settings, lost):
    """docs/serving.md: transformers reads Granite's words as its own newer ones, and those it writes."""
    teacher = random_teacher(name)
    model, _ = transplant(teacher, settings)
    teacher.save_pretrained(tmp_path / "teacher")
    save_model(model, tmp_path / "host", tmp_path / "teacher")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    with torch.no_grad():
        merged.get_input_embeddings().weight.mul_(1.5)
    merged.save_pretrained(tmp_path / "again")
    before, after = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("host", "again"))
    assert {key for key in before if before[key] != after.get(key)} == lost
    lay_out(tmp_path / "again", merged.config, tmp_path / "for export")
    assert {**before, **json.loads((tmp_path / "for export" / "config.json").read_text())} == before
    shutil.copy(tmp_path / "host" / "config.json", tmp_path / "again" / "config.json")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, some_tokens()), logits(merged, some_tokens()))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_config_json_says_that_the_state_of_gated_deltanet_is_in_float32(tmp_path, name):
    """As published ones do: engines take the model's dtype otherwise. transformers passes it on and reads the same."""
    teacher = random_teacher(name)
    model, _ = transplant(teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    save_model(model, tmp_path / "host", tmp_path / "teacher")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    assert torch.equal(logits(again, some_tokens()), logits(model, some_tokens()))
    again.save_pretrained(tmp_path / "again")
    for folder in ("host", "again"):
        values = json.loads((tmp_path / folder / "config.json").read_text())
        assert values["mamba_ssm_dtype"] == "float32"
    save_model(again, tmp_path / "twice", tmp_path / "host")
    written = [(tmp_path / folder / "config.json").read_text() for folder in ("host", "twice")]
    assert json.loads(written[0]) == json.loads(written[1])


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
