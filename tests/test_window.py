"""Sliding windows: the same class, no new weights, and a cache as long as the window."""

import json

import pytest
import torch
from conftest import run_command, small_morphable
from families import random_teacher
from transformers import AutoModelForCausalLM, PreTrainedModel

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.save import save_model
from flashmorph.errors import UserError
from flashmorph.hosts import cache_bytes, configure
from flashmorph.mixers import SLIDING
from flashmorph.model.morphable import Morphable, build
from flashmorph.own import CACHE
from flashmorph.plan import FULL, Budget, Plan

WINDOW, TOKENS = 8, 40
FAMILIES = ["qwen3", "qwen2", "smollm3", "llama", "mistral", "ministral"]
CASES = [*(f"{family}: grouped" for family in FAMILIES), "qwen3: yarn", "smollm3: multi-query, yarn"]


def teacher_of(name: str) -> PreTrainedModel:
    """As the other tests have it; SmolLM3 with a layer without RoPE, which a window does not mind."""
    return random_teacher(name, **({"no_rope_layers": [1, 0]} if name == "smollm3: grouped" else {}))


def morphable_of(teacher: PreTrainedModel) -> Morphable:
    return Morphable(transplant(teacher, {"window": WINDOW})[0])


def plan_of(morphable: Morphable, full: list[int]) -> Plan:
    budget = Budget("layers", 1)
    return morphable.space(budget).plan([f"layers.{layer}" for layer in full], budget)


def tokens(rows: int = 2, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def masked_by_hand(teacher: PreTrainedModel, ids: torch.Tensor, full: list[int]) -> torch.Tensor:
    """The teacher's own logits, its layers but `full` seeing `WINDOW` tokens by a mask that is made here."""
    distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    mask = torch.zeros(ids.shape[1], ids.shape[1])
    mask = mask.masked_fill((distance < 0) | (distance >= WINDOW), float("-inf"))[None, None]
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, inputs, arguments: (inputs, {**arguments, "attention_mask": mask}), with_kwargs=True
        )
        for number, layer in enumerate(teacher.model.layers)
        if number not in full
    ]
    logits = teacher(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("full", [[0], [1], []])
@pytest.mark.parametrize("name", CASES)
def test_a_switched_layer_sees_its_window(name, full):
    teacher = teacher_of(name)
    morphable, ids = morphable_of(teacher), tokens()
    expected = masked_by_hand(teacher, ids, full)
    hybrid = build(morphable, plan_of(morphable, full))
    with torch.no_grad():
        torch.testing.assert_close(hybrid(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        gates = torch.tensor([[1.0, 0.0] if layer in full else [0.0, 1.0] for layer in range(2)])
        mixed = hybrid.lm_head(morphable(ids, gates))
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    assert (masked_by_hand(teacher, ids, [0, 1]) - expected).abs().max() > 1e-2


def test_the_window_is_the_only_difference_to_the_teacher():
    teacher = teacher_of("qwen3: grouped")
    morphable = morphable_of(teacher)
    hybrid = build(morphable, plan_of(morphable, [1]))
    assert type(hybrid) is type(teacher)
    assert not morphable.branch_state() and not morphable.branch_parameters()
    for name, weight in teacher.state_dict().items():
        torch.testing.assert_close(hybrid.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_a_switched_layer_is_as_long_as_the_window(family, tmp_path):
    morphable = morphable_of(teacher_of(f"{family}: grouped"))
    build(morphable, plan_of(morphable, [1])).save_pretrained(tmp_path / "hybrid")
    hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype=torch.float32)
    assert hybrid.config.layer_types == ["sliding_attention", "full_attention"]
    ids = tokens(rows=1)
    found = hybrid.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0
    )
    lengths = [layer.keys.shape[2] for layer in found[CACHE].layers]
    assert lengths == [WINDOW - 1, TOKENS + 5]
    size = sum(part.nbytes for layer in found[CACHE].layers for part in (layer.keys, layer.values))
    assert cache_bytes(hybrid.config, TOKENS + 5) == size
    again = ids
    with torch.no_grad():
        for _ in range(6):
            logits = hybrid(input_ids=again, use_cache=False).logits[:, -1:]
            again = torch.cat([again, logits.argmax(-1)], 1)
    assert found.sequences.tolist() == again.tolist()


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.parametrize("full", [[0], [1], []])
def test_an_engine_that_goes_by_max_window_layers_cannot_take_windows_for_none(family, full, tmp_path):
    """vLLM's own class computes every layer full where this is the number of layers, as published teachers have it."""
    teacher = random_teacher(f"{family}: grouped", max_window_layers=2)
    morphable = morphable_of(teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    save_model(build(morphable, plan_of(morphable, full)), tmp_path / "hybrid", tmp_path / "teacher")
    assert json.loads((tmp_path / "hybrid" / "config.json").read_text())["max_window_layers"] == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in again.model.layers]
    assert windows == [None if layer in full else WINDOW for layer in range(2)]
    with torch.no_grad():
        expected = masked_by_hand(teacher, tokens(), full)
        torch.testing.assert_close(again(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_every_gate_has_a_gradient():
    morphable = morphable_of(teacher_of("qwen3: grouped"))
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    morphable(tokens(), gates).square().sum().backward()
    assert (gates.grad != 0).all()
    assert morphable.options == (FULL, SLIDING)


def test_the_whole_path_with_windows(teacher_folder, recipe_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--window", 16, "-o", out) == 0
    printed = capsys.readouterr().out
    assert "align      nothing: a window has no weights" in printed
    assert "■ full □ sliding" in printed
    hybrid = AutoModelForCausalLM.from_pretrained(out)
    assert sorted(hybrid.config.layer_types) == ["full_attention", "sliding_attention"]
    assert hybrid.config.sliding_window == 16 and hybrid.config.model_type == "qwen3"
    card = (out / "README.md").read_text()
    assert "□ sliding window" in card and "flash-linear-attention" not in card


def test_given_plans_are_of_the_host_with_its_windows(teacher_folder, recipe_file, tmp_path, capsys):
    """Layers by hand and a saved plan build; a plan of the other kind of host is refused before there is a folder."""
    options = ("build", teacher_folder, "--recipe", recipe_file)
    windows = ("--window", 16)
    assert run_command(*options, *windows, "-o", tmp_path / "by_hand", "--layers", "1") == 0
    (made,) = (tmp_path / "by_hand").glob("stages/build-*/model/config.json")
    assert json.loads(made.read_text())["layer_types"] == ["sliding_attention", "full_attention"]
    window_plan, linear_plan = tmp_path / "window.json", tmp_path / "linear.json"
    for path, option in ((window_plan, SLIDING), (linear_plan, "linear")):
        Plan({"layers.0": option, "layers.1": FULL}, Budget("layers", 1)).save(path)
    capsys.readouterr()
    for command in ("morph", "build", "distill", "extend"):
        refused = [command, *options[1:], "-o", tmp_path / "refused", "--plan"]
        assert run_command(*refused, window_plan) == 2
        said = capsys.readouterr().err
        assert "layers.0 has the option 'sliding', and layers can be full or linear here" in said
        assert "--set host.window=TOKENS" in said
        assert run_command(*refused, linear_plan, *windows) == 2
        assert "'linear', and layers can be full or sliding here; " in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    again = ("-o", tmp_path / "again", "--from", tmp_path / "by_hand", "--plan", window_plan)
    assert run_command(*options, *again, "--set", "host.window=16") == 0
    assert "done before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes", "window", "problem"),
    [
        ("qwen3: grouped", {}, 512, "host.window must be a number of tokens from 2 to below 512; got 512"),
        *(
            ("qwen3: grouped", {}, window, "host.window must be a whole number at least 2; got ")
            for window in (1, -8, 8.5, "wide", None, True, [8], 1e21)
        ),
        ("qwen3: grouped", {}, 10**18, "host.window must be a number of tokens from 2 to below 512; got 1000"),
        ("qwen3: grouped", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 8, "sliding"),
        ("llama: grouped", {"attention_bias": True}, 8, "the teacher has biases \\(attention_bias\\); Ministral"),
        ("granite: grouped", {}, 8, "'granite' have no host for windows; these have one: llama, ministral"),
    ],
)
def test_what_a_window_cannot_be_is_refused(name, changes, window, problem):
    with pytest.raises(UserError, match=problem):
        configure(random_teacher(name, **changes).config, {"window": window})


def test_without_a_window_the_host_is_another():
    config = small_morphable().model.config
    assert config.model_type == "qwen3_5_text"
