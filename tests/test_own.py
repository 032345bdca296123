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
from torch import nn
from transformers import AutoModelForCausalLM

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_config, load_model
from flashmorph.convert.save import save_model
from flashmorph.errors import UserError
from flashmorph.hosts import OWN, cache_bytes, configure, layer_space
from flashmorph.model.morphable import Morphable, attach
from flashmorph.own import FORMAT, TRAVELLING, FlashmorphConfig, FlashmorphForCausalLM, held_after
from flashmorph.own.linear_flashmorph import chunked
from flashmorph.own.thin_flashmorph import Thin, halve
from flashmorph.own.window_flashmorph import Window
from flashmorph.plan import FULL, Budget, Plan

SETTINGS = {"mixers": "full,window,linear", "window": 8, "sinks": 2}
CASES = [f"{family}: {shape}" for family in OWN.teachers for shape in SHAPES[family]]
IDS = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(3))
KINDS = {
    "windows with sinks": {"window": {"kind": "window", "size": 8, "sinks": 3}},
    "a window longer than a block of queries": {"window": {"kind": "window", "size": 300, "sinks": 1}},
    "learned decay": {"linear": {"kind": "linear"}},
    "fixed decay, normalised": {"linear": {"kind": "linear", "decay": "fixed", "norm": True}},
    "a thinned sample": {"thin": {"kind": "thin", "points": 4, "window": 6, "sinks": 2}},
    "thinned at random": {"thin": {"kind": "thin", "points": 2, "window": 3, "thresholds": "published"}},
    "pooled": {"pooled": {"kind": "pooled", "segment": 4, "window": 7, "sinks": 2}},
    "pooled, a window shorter than a segment": {"pooled": {"kind": "pooled", "segment": 6, "window": 2}},
    "chunks": {"dash": {"kind": "dash", "chunk": 4, "gamma": 2.0}},
    "chunks, two of them local": {"dash": {"kind": "dash", "chunk": 7, "gamma": 0.5, "local": 2, "sigma": 10.0}},
    "convolved": {
        "window": {"kind": "window", "size": 8, "sinks": 2, "conv": {"taps": 3, "rank": 2}},
        "linear": {"kind": "linear", "conv": {"taps": 4, "rank": 0}},
    },
    "no decay": {"linear": {"kind": "linear", "decay": "none"}},
    "both": {"window": {"kind": "window", "size": 5, "sinks": 0}, "linear": {"kind": "linear"}},
}


def random_hybrid(settings: dict, seed: int = 0, everywhere: bool = False) -> FlashmorphForCausalLM:
    """Three layers of four key-value heads with random mixers, at least one of each kind, in float32."""
    drawn = random.Random(seed)
    names = [*settings, *([] if everywhere else [FULL])]
    chosen = [[drawn.choice(names) for _ in range(4)] for _ in range(3)]
    chosen[0] = [names[number % len(names)] for number in range(4)]
    config = FlashmorphConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        mixer_settings=settings,
        mixers=[{name: [head for head in range(4) if layer[head] == name] for name in set(layer)} for layer in chosen],
    )
    torch.manual_seed(seed)
    model = FlashmorphForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if any(part in name for part in ("proj", "map", "embed", "summary", "conv")):
            nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


def logits(model, ids, **arguments):
    return model(ids, use_cache=False, **arguments).logits


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


@pytest.mark.parametrize("everywhere", [False, True], ids=["beside full heads", "in all heads"])
@pytest.mark.parametrize("kind", KINDS)
class TestEveryMixer:
    def test_is_causal(self, kind, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere)
        changed = IDS.clone()
        changed[:, 30:] = 5
        assert torch.equal(logits(model, changed)[:, :30], logits(model, IDS)[:, :30])

    def test_reads_in_parts_and_writes_as_it_reads_at_once(self, kind, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere)
        cache, parts = None, []
        for start, stop in ((0, 25), (25, 40), *((step, step + 1) for step in range(40, 60))):
            output = model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
            cache, parts = output.past_key_values, [*parts, output.logits]
        assert torch.allclose(torch.cat(parts, 1), logits(model, IDS), atol=2e-5)

    def test_reads_padded_rows_as_each_alone(self, kind, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere)
        pads = 9
        ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), IDS[:1, :-pads]], 1)
        ids = torch.cat([ids, IDS[1:]])
        mask = torch.ones_like(ids)
        mask[0, :pads] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = logits(model, ids, attention_mask=mask, position_ids=positions)
        assert torch.allclose(output[0, pads:], logits(model, IDS)[0, :-pads], atol=2e-5)
        assert torch.allclose(output[1], logits(model, IDS)[1], atol=2e-5)

        written = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        row = IDS[:1, :-pads]
        for _ in range(12):
            row = torch.cat([row, logits(model, row)[:, -1:].argmax(-1)], 1)
        assert torch.equal(written[0, pads:], row[0])

    def test_beam_search_with_a_cache_is_that_without(self, kind, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere)
        common = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        ids = IDS[:, :20]
        mask = torch.ones_like(ids)
        with_cache = model.generate(ids, attention_mask=mask, **common)
        assert torch.equal(with_cache, model.generate(ids, attention_mask=mask, use_cache=False, **common))

    def test_the_cache_has_the_computed_size(self, kind, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere)
        model.config.dtype = torch.float32
        cache = model(IDS[:1], use_cache=True).past_key_values
        held = 0
        for layer in cache.layers:
            tensors = [layer.keys, layer.values] if layer.is_initialized else []
            tensors += [tensor for state in getattr(layer, "states", {}).values() for tensor in state.values()]
            # A window also counts tokens, and marks those that are no padding: a byte each and no more.
            held += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        assert held == cache_bytes(model.config, IDS.shape[1])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_chunked_recurrent_and_parallel_linear_attention_are_one(decay):
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2, 4, 50, 6, generator=generator)
    k = torch.rand(2, 2, 50, 6, generator=generator)
    v = torch.randn(2, 2, 50, 5, generator=generator)
    rates = decay * torch.rand(2, 2, 50, generator=generator)
    found, last = chunked(q, k, v, rates, None, 2, 16)
    state = torch.zeros(2, 2, 6, 5)
    steps = []
    for t in range(50):
        state = state * torch.exp(-rates[:, :, t])[..., None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        steps.append(torch.einsum("bhgf,bhfv->bhgv", q.unflatten(1, (2, 2))[:, :, :, t], state).flatten(1, 2))
    assert torch.allclose(found, torch.stack(steps, 2), atol=1e-5)
    assert torch.allclose(last, state, atol=1e-5)
    fallen = rates.cumsum(-1)
    weights = torch.exp(fallen[..., None, :] - fallen[..., :, None]).tril()
    scores = torch.einsum("bhgtf,bhsf->bhgts", q.unflatten(1, (2, 2)), k) * weights[:, :, None]
    assert torch.allclose(found, torch.einsum("bhgts,bhsv->bhgtv", scores, v).flatten(1, 2), atol=1e-5)


def smooth(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values `[1, 1, tokens, 8]` of one head; values are smooth in keys of 4 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, 4, generator=generator) / 2
    directions = torch.randn(4, 8, generator=generator)
    padded = torch.cat([keys, torch.zeros(tokens, 4)], 1)
    queries = torch.cat([torch.randn(tokens, 4, generator=generator), torch.zeros(tokens, 4)], 1)
    return queries[None, None], padded[None, None], torch.sin(keys @ directions)[None, None]


class TestThin:
    @torch.no_grad()
    def test_is_exact_while_nothing_is_halved(self):
        q, k, v = smooth(40)
        thin = Thin(1, 1, 8, 8, points=8, window=25)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert thin.held(40) == (40, 0)
        assert torch.allclose(thin(q, k, v, q[0], None, None), exact, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("thresholds", ["greedy", "published"])
    def test_the_weights_of_all_that_is_held_sum_to_the_tokens(self, thresholds):
        thin, state = Thin(1, 1, 8, 8, points=4, window=5, sinks=2, thresholds=thresholds), {}
        q, k, v = smooth(150)
        for end in range(150):
            part = slice(end, end + 1)
            thin(q[:, :, part], k[:, :, part], v[:, :, part], q[0, :, part], None, state)
            exact, sampled = thin.held(end + 1)
            assert (state["k"].shape[2], state["points_k"].shape[2]) == (exact, sampled)
            assert exact + sum(thin._weights(end + 1)) == end + 1

    @torch.no_grad()
    def test_more_points_err_less_and_less_than_a_window_of_their_size(self):
        q, k, v = smooth(2048)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -256:]

        def error(mixer) -> float:
            found = mixer(q, k, v, q[0], None, None)[:, :, -256:]
            return ((found - exact).norm() / exact.norm()).item()

        errors = [error(Thin(1, 1, 8, 8, points=points, window=32)) for points in (8, 16, 32, 64)]
        assert errors[-1] == min(errors) < errors[0] / 3
        exact_tokens, points = held_after(2048, 64, 32)
        assert errors[-1] < error(Window(1, 1, 8, 8, size=exact_tokens + points)) * 0.7

    def test_points_that_are_the_same_are_halved_to_one_of_each(self):
        k = torch.randn(1, 2, 6, 4).repeat_interleave(2, 2)
        v = torch.randn(1, 2, 6, 4).repeat_interleave(2, 2)
        kept = halve(k, v, "greedy")
        assert (kept // 2 == torch.arange(6)).all()

    def test_halving_balances_the_kernel_better_than_chance(self):
        _, k, v = smooth(64)
        scores = torch.exp(k[0, 0] @ k[0, 0].T / 8**0.5) * (v[0, 0] @ v[0, 0].T + v.abs().max() ** 2)

        def imbalance(kept: torch.Tensor) -> float:
            signs = -torch.ones(64)
            signs[kept] = 1
            return (signs @ scores @ signs).item()

        drawn = torch.Generator().manual_seed(0)
        chance = [imbalance(2 * torch.arange(32) + torch.randint(2, (32,), generator=drawn)) for _ in range(50)]
        assert imbalance(halve(k, v, "greedy")[0, 0]) < min(chance)


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


def saved(folder: Path, **settings) -> tuple[Path, torch.Tensor]:
    """A hybrid with both mixers on disk as runs publish it, and its logits."""
    origin = folder / "origin"
    random_teacher("llama: grouped", 1, num_hidden_layers=3, vocab_size=len(tiny_tokenizer())).save_pretrained(origin)
    tiny_tokenizer().save_pretrained(origin)
    model, _ = transplant(load_model(origin, torch.float32), SETTINGS | settings)
    supernet, _ = attach(model, IDS)
    space = supernet.space(Budget("heads", 1))
    built = supernet.instantiate(space.of_options([0, 1, 2, 0, 1, 2], Budget("heads", 2)))
    expected = logits(built, IDS)
    save_model(built, folder / "hybrid", origin)
    return folder / "hybrid", expected


def test_a_checkpoint_opens_where_flashmorph_is_not(tmp_path):
    folder, expected = saved(tmp_path)
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


@pytest.mark.parametrize("way", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_what_a_state_cannot_do_is_refused(way):
    model = random_hybrid(KINDS["both"])
    ids = IDS[:1, :20]
    with pytest.raises(ValueError, match="dynamic cache|stateful"):
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
        ({"mixers": "full,window", "window": 511}, "below the teacher's longest context"),
        ({"mixers": "full,linear", "decay": "slow"}, "host.decay must be"),
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
