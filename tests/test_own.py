"""Our own model type: the exact move, mixers head by head, the cache, the files that travel, and the gates."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from families import SHAPES, random_teacher
from own_models import IDS, KINDS, logits, random_hybrid
from torch import nn
from transformers import AutoModelForCausalLM

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_config, load_model
from flashmorph.convert.save import replace_checkpoint, save_model
from flashmorph.errors import UserError
from flashmorph.hosts import OWN, cache_bytes, configure, host_of, layer_space
from flashmorph.mixers.own import OWN_MIXERS
from flashmorph.model.morphable import Morphable, attach
from flashmorph.own import FORMAT, TRAVELLING, FlashmorphForCausalLM
from flashmorph.plan import FULL, Budget, Plan

SETTINGS = {"mixers": "full,window,linear", "window": 8, "sinks": 2}
EVERY = {**SETTINGS, "mixers": ",".join(["full", *OWN_MIXERS]), "points": 2, "segment": 3, "chunk": 4, "conv": 3}
CASES = [f"{family}: {shape}" for family in OWN.teachers for shape in SHAPES[family]]


@pytest.mark.parametrize("case", CASES)
def test_the_move_is_exact(case):
    try:
        model, proof = transplant(random_teacher(case), {"mixers": "full,window", "window": 8})
    except UserError as refused:
        # Of Phi-3 two lists of rope factors, of any family a part of each head.
        assert "longrope" in str(refused) or "partial_rotary_factor" in str(refused)
        return
    # Phi-3 multiplies by its joint projections, which may round otherwise.
    assert proof.difference == 0 or (case.startswith("phi3") and proof.difference <= proof.tolerance)
    assert isinstance(model, FlashmorphForCausalLM)


def test_layers_without_rope_move_exactly():
    teacher = random_teacher("smollm3: grouped", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    model, proof = transplant(teacher, {"mixers": "full,window", "window": 8})
    assert proof.difference == 0
    assert model.config.no_rope_layers == [1, 1, 1, 0]


def test_an_mlp_with_biases_moves_exactly():
    _, proof = transplant(random_teacher("llama: grouped", mlp_bias=True), {"mixers": "full,window", "window": 8})
    assert proof.difference == 0


def test_windows_without_sinks_are_those_of_the_stock_class():
    teacher = random_teacher("llama: grouped", 1, num_hidden_layers=3)
    stock, own = (
        attach(transplant(teacher, settings)[0], IDS)[0]
        for settings in ({"window": 5}, {"mixers": "full,window", "window": 5, "sinks": 0})
    )
    layers = stock.space(Budget("layers", 1)).plan(["layers.1"], Budget("layers", 1))
    heads = own.space(Budget("heads", 1))
    same = heads.plan([group for group in heads.groups if group.layer == 1], Budget("heads", 2))
    assert torch.equal(logits(own.instantiate(same), IDS), logits(stock.instantiate(layers), IDS))


def morphable(teacher: str = "llama: grouped", **settings) -> Morphable:
    """A random teacher of three layers with branches whose own weights are random."""
    model, _ = transplant(random_teacher(teacher, 1, num_hidden_layers=3), SETTINGS | settings)
    made, _ = attach(model, IDS)
    for weight in (each for branch in made.branch_parameters() for each in branch):
        nn.init.normal_(weight.data, std=0.3)
    return made


@pytest.mark.parametrize("teacher", ["llama: grouped", "qwen3: bias", "llama: bias, untied, llama3"])
@pytest.mark.parametrize("seed", range(3))
def test_one_hot_gates_are_the_built_model(teacher, seed):
    supernet = morphable(teacher, decay=("learned", "fixed", "none")[seed], head_norm=seed == 1)
    space = supernet.space(Budget("heads", 1))
    chosen = random.Random(seed)
    plan = space.of_options([chosen.randrange(3) for _ in space.groups], Budget("heads", 1))
    gates = torch.tensor(space.one_hot(plan), dtype=torch.float32).requires_grad_()
    hidden = supernet(IDS, gates)
    built = supernet.instantiate(plan)
    assert torch.allclose(built.lm_head(hidden), logits(built, IDS), atol=5e-5)
    hidden.square().mean().backward()
    assert gates.grad is not None and torch.isfinite(gates.grad).all() and (gates.grad != 0).all()
    (_, same) = next(iter(supernet.each_plan(IDS, gates.detach()[None])))
    assert torch.allclose(same, hidden, atol=5e-5)


def test_one_hot_gates_are_the_built_model_with_every_mixer_and_convolutions():
    supernet = morphable(**EVERY)
    space = supernet.space(Budget("heads", 1))
    names, groups = set(), len(space.groups)
    in_turn = [*range(1, len(space.options)), 0]
    for start in range(0, len(in_turn), groups):
        plan = space.of_options((in_turn[start:] + in_turn)[:groups], Budget("heads", 1))
        gates = torch.tensor(space.one_hot(plan), dtype=torch.float32).requires_grad_()
        hidden = supernet(IDS, gates)
        built = supernet.instantiate(plan)
        names |= {name for layer in built.config.mixers for name in layer}
        assert torch.allclose(built.lm_head(hidden), logits(built, IDS), atol=1e-3)
        hidden.square().mean().backward()
        assert gates.grad is not None and torch.isfinite(gates.grad).all() and (gates.grad != 0).all()
    assert names == set(supernet.options)


def test_a_saved_model_has_its_options_in_the_same_order(tmp_path):
    folder, _ = saved(tmp_path, **EVERY)
    wanted = OWN.asked_for(EVERY)
    assert list(host_of(load_config(folder)).mixers) == list(wanted.mixers) == EVERY["mixers"].split(",")


def test_a_plan_of_layers_is_the_plan_of_all_their_heads():
    supernet = morphable()
    layers, heads = supernet.space(Budget("layers", 1)), supernet.space(Budget("heads", 1))
    by_layer = layers.of_options([1, 0, 2], Budget("layers", 1))
    by_head = heads.of_options([1, 1, 0, 0, 2, 2], Budget("heads", 2))
    models = [supernet.instantiate(plan) for plan in (by_layer, by_head)]
    assert models[0].config.mixers == models[1].config.mixers
    assert torch.equal(*(logits(model, IDS) for model in models))
    gates = [torch.tensor(space.one_hot(plan)).float() for space, plan in ((layers, by_layer), (heads, by_head))]
    assert torch.equal(*(supernet(IDS, each) for each in gates))


@torch.no_grad()
def saved(folder: Path, **settings) -> tuple[Path, torch.Tensor]:
    """A hybrid with both mixers on disk as runs publish it, and its logits."""
    origin = folder / "origin"
    random_teacher("llama: grouped", 1, num_hidden_layers=3, vocab_size=len(tiny_tokenizer())).save_pretrained(origin)
    tiny_tokenizer().save_pretrained(origin)
    model, _ = transplant(load_model(origin, torch.float32), SETTINGS | settings)
    supernet, _ = attach(model, IDS)
    space = supernet.space(Budget("heads", 1))
    chosen = [number % len(space.options) for number in range(len(space.groups))]
    built = supernet.instantiate(space.of_options(chosen, Budget("heads", 2)))
    expected = logits(built, IDS)
    save_model(built, folder / "hybrid", origin)
    return folder / "hybrid", expected


@pytest.mark.parametrize(
    "settings",
    [{}, EVERY, {"mixers": "full,thin", "points": 2, "schedule": "express", "halving": "published"}],
    ids=["window and linear", "every mixer, convolved", "a bounded sample"],
)
def test_a_checkpoint_opens_where_flashmorph_is_not(tmp_path, settings):
    folder, expected = saved(tmp_path, **settings)
    torch.save({"ids": IDS, "logits": expected}, tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["flashmorph"] = None
import torch
from transformers import AutoModelForCausalLM
known = torch.load({str(tmp_path / "expected.pt")!r})
for source, target in (("hybrid", "again"), ("again", "third")):
    folder = {str(tmp_path)!r} + "/" + source
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(known["ids"]).logits, known["logits"]), source
    model.save_pretrained({str(tmp_path)!r} + "/" + target)
print(type(model).__module__)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers_modules" in done.stdout
    assert {path.name for path in TRAVELLING} <= {path.name for path in folder.iterdir()}


def test_what_is_published_has_all_of_its_code(tmp_path):
    folder, _ = saved(tmp_path)
    replace_checkpoint(tmp_path, folder, tmp_path / "origin")
    assert {path.name: path.read_text() for path in TRAVELLING} == {
        path.name: path.read_text() for path in tmp_path.glob("*.py")
    }


def test_ours_never_run_the_files_of_a_folder(tmp_path):
    folder, expected = saved(tmp_path)
    for path in TRAVELLING:
        (folder / path.name).write_text("raise SystemExit('the code of the folder ran')")
    assert torch.equal(logits(load_model(folder, torch.float32), IDS), expected)
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(opened, IDS), expected)


def test_files_of_another_format_are_refused_in_one_sentence(tmp_path):
    folder, _ = saved(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"own_format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"format {FORMAT + 1} of flashmorph's model files") as refused:
        load_config(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixers": [{"full": [0, 1]}]}, "mixers has 1 layers"),
        ({"mixers": [{"full": [0]}] * 3}, "each of the 2 key-value heads has one"),
        ({"mixers": [{"full": [0], "swamp": [1]}] * 3}, "mixer_settings has no 'swamp'"),
        ({"mixer_settings": {"window": {"kind": "swamp"}, "linear": {"kind": "linear"}}}, "swamp"),
        ({"mixer_settings": {"window": {"kind": "window", "size": -3}, "linear": {"kind": "linear"}}}, "size"),
        ({"mixers": "full"}, "mixers"),
    ],
)
def test_a_damaged_configuration_is_one_sentence(tmp_path, changes, words):
    folder, _ = saved(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=words) as refused:
        load_model(folder, torch.float32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "way", [{"cache_implementation": "static"}, {"cache_implementation": "offloaded"}, {"prompt_lookup_num_tokens": 3}]
)
def test_what_a_state_cannot_do_is_refused(way):
    if way.get("cache_implementation") == "offloaded":
        try:
            torch.Stream()
        except RuntimeError:
            pytest.skip("a build for CUDA has no streams without a GPU, and transformers asks for one first")
    model = random_hybrid(KINDS["both"])
    ids = IDS[:1, :20]
    with pytest.raises(ValueError, match="dynamic cache|offloaded|stateful"):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0, **way
        )


def test_a_switched_head_is_no_larger_than_the_attention():
    supernet = morphable()
    full = sum(weight.numel() for weight in supernet.model.parameters())
    space = supernet.space(Budget("heads", 1))
    windows = supernet.instantiate(space.of_options([1] * len(space.groups), Budget("heads", 1)))
    assert (
        windows.num_parameters()
        == transplant(random_teacher("llama: grouped", 1, num_hidden_layers=3), SETTINGS)[0].num_parameters()
    )
    assert windows.num_parameters() < full


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mixers": "window"}, "full and at least one of"),
        ({"mixers": "full,swamp"}, "full and at least one of"),
        ({"mixers": 3}, "full and at least one of"),
        ({"mixers": "full,window", "window": 511}, "must be below"),
        ({"mixers": "full,linear", "decay": "slow"}, "host.decay must be"),
        ({"mixers": "full,pool"}, "did you mean pooled"),
        ({"mixers": "full,dash", "density": 2}, "host.density must be"),
        ({"mixers": "full,dash", "dash": "paper"}, "host.dash must be"),
        ({"mixers": "full,pooled", "segment": 1}, "host.segment must be"),
        ({"mixers": "full,thin", "schedule": "expres"}, "host.schedule must be reduce or express; got 'expres'"),
        ({"mixers": "full,thin", "halving": "best"}, "host.halving must be greedy or published; got 'best'"),
        ({"mixers": "full,thin", "schedule": "express", "points": 48}, "host.points=48 .*a power of two, such as 32"),
        ({"mixers": "full,dash", "chunk": 1}, "chunk=1 is too small"),
        ({"mixers": "full,window", "conv": 1}, "conv=1 is too small"),
        ({"mixers": "full,dash", "chunk": 4096}, "chunk=4096: the mixer dash would see"),
        ({"mixers": "full,pooled", "segment": 4096}, "their sum must be below"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        configure(random_teacher("llama: grouped").config, settings)


def test_a_family_that_cannot_be_switched_by_head_names_those_that_can():
    with pytest.raises(UserError, match="cannot be switched by head; these can: llama"):
        configure(random_teacher("granite: grouped").config, {"mixers": "full,window"})


def test_a_budget_in_heads_is_refused_by_a_host_of_layers():
    host, config = configure(random_teacher("llama: grouped").config)
    with pytest.raises(UserError, match="--mixers full,window takes heads"):
        layer_space(host, config, Budget.parse("heads=2"))


@pytest.mark.parametrize("text", ["heads=3", "heads=25%", "heads=12.5%"])
def test_budgets_in_heads_are_read_as_they_are_written(text):
    assert str(Budget.parse(text)) == text
    host, config = configure(random_teacher("llama: grouped", num_hidden_layers=4).config, {"mixers": "full,window"})
    space = layer_space(host, config, Budget.parse(text))
    assert len(space.groups) == 8
    kept = {"heads=3": 3, "heads=25%": 2, "heads=12.5%": 1}[text]
    plan = space.best(torch.arange(16).reshape(8, 2).flip(1).numpy(), Budget.parse(text))
    assert len(plan.full_groups) == kept


@pytest.mark.parametrize("text", ["heads=0", "heads=", "heads=-1", "heads=3 layers"])
def test_wrong_budgets_in_heads_are_refused(text):
    with pytest.raises(UserError, match="budget"):
        Budget.parse(text)


def test_bytes_are_spent_on_heads(tmp_path):
    host, config = configure(random_teacher("llama: grouped").config, {"mixers": "full,window", "window": 8})
    config.dtype = torch.float32
    space = layer_space(host, config, Budget.parse("kv=64KiB@512"))
    assert space.has_heads
    every = space.of_options([0] * len(space.groups), Budget("heads", 1))
    assert space.cost_of(every) == cache_bytes(host.with_plan(config, [FULL] * 4), 512)
    mixed = Plan.of(
        {group: (FULL, "window")[number % 2] for number, group in enumerate(space.groups)}, Budget("heads", 2)
    )
    assert space.cost_of(mixed) == cache_bytes(host.with_plan(config, list(mixed.assignments.values())), 512)


def test_saved_again_it_is_the_same(tmp_path):
    folder, expected = saved(tmp_path, decay="fixed", head_norm=True)
    model = load_model(folder, torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", torch.float32), IDS), expected)
    shutil.rmtree(tmp_path / "again")
