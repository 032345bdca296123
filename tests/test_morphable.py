"""The morphable model and the plain models that are built from it."""

import itertools

import pytest
import torch
from conftest import random_qwen3, small_morphable
from families import random_teacher
from transformers import AutoModelForCausalLM, DynamicCache

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.save import save_model
from flashmorph.errors import UserError
from flashmorph.model.layer import relative_error
from flashmorph.model.morphable import Morphable, attach, build
from flashmorph.own import CACHE
from flashmorph.plan import FULL, Budget, Plan
from flashmorph.stages import alignment_errors

LAYERS = 3
TEACHERS = {
    "qwen3": ("qwen3: grouped", {}),
    "qwen3, multi-head, untied, bias": (
        "qwen3: bias",
        {"num_key_value_heads": 4, "head_dim": 12},
    ),
    "qwen3_moe": ("qwen3_moe: grouped", {}),
    "llama": ("llama: grouped", {}),
    "llama, surplus groups": ("llama: surplus groups", {}),
}
PLANS = ([], [0], [2], [0, 2], [0, 1, 2])
WITH_FULL = PLANS[1:]
"""transformers has no cache for a model without a full layer."""


@pytest.fixture(scope="module", params=TEACHERS)
def morphable(request) -> Morphable:
    """Not to be changed by a test."""
    teacher, changes = TEACHERS[request.param]
    morphable = small_morphable(2, teacher, num_hidden_layers=LAYERS, **changes)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in itertools.chain(*morphable.branch_parameters()):
            weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.1 * weight.std(correction=0).item() + 0.02)
    return morphable


def some_tokens(rows: int = 2, length: int = 70, seed: int = 0) -> torch.Tensor:
    """More than one chunk of 64, and not a whole number of them."""
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def plan_of(morphable: Morphable, layers: list[int]) -> Plan:
    budget = Budget("layers", max(1, len(layers)))
    return morphable.space(budget).plan([f"layers.{layer}" for layer in layers], budget)


def gates_of(morphable: Morphable, layers: list[int]) -> torch.Tensor:
    return torch.tensor(morphable.space(Budget("layers", 1)).one_hot(plan_of(morphable, layers)), dtype=torch.float32)


def test_attach_changes_the_model_in_place_and_build_makes_one_of_its_own():
    model, _ = transplant(random_teacher("qwen3: grouped", 0))
    morphable, errors = attach(model, some_tokens())
    assert morphable.model is model and not model.training and model.config.use_cache is False
    assert not any(weight.requires_grad for weight in model.parameters()) and len(errors) == len(morphable.layers)
    hybrid = build(morphable, plan_of(morphable, [0]))
    assert hybrid.config.use_cache and all(weight.requires_grad for weight in hybrid.parameters())
    own = {weight.data_ptr() for weight in model.parameters()}
    assert not own & {weight.data_ptr() for weight in hybrid.parameters()}
    with pytest.raises(UserError, match="is no host of flashmorph's"):
        attach(random_teacher("llama: grouped", 0), some_tokens())


@torch.no_grad()
def logits(model, ids: torch.Tensor, **settings) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **settings).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("seed", range(3))
def test_every_branch_starts_better_than_silence(name, seed):
    teacher, changes = TEACHERS[name]
    model, _ = transplant(random_teacher(teacher, seed, num_hidden_layers=LAYERS, **changes))
    ids = some_tokens(4, 64, seed)
    morphable, errors = attach(model, ids)
    assert len(errors) == LAYERS
    assert all(0 < error < 1 for error in errors)
    assert alignment_errors(morphable, ids) == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("host", [None, {"mixers": "full,mamba2"}, {"mixers": "full,linear"}], ids=str)
def test_a_bias_of_keys_costs_the_start_nothing(host):
    """Those of Qwen2.5 may be far larger than keys. They lie in slow pairs of RoPE, where a softmax cancels
    them, and a state would hold little else."""
    errors = []
    for size in (0.0, 50.0):
        teacher = random_teacher("qwen2", 0, num_hidden_layers=LAYERS)
        with torch.no_grad():
            for layer in teacher.model.layers:
                bias = layer.self_attn.k_proj.bias.zero_().view(-1, layer.self_attn.head_dim)
                bias[:, [layer.self_attn.head_dim // 2 - 1, -1]] = size
        errors.append(attach(transplant(teacher, host)[0], some_tokens(4, 64, 0))[1])
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_calibration_of_one_row_is_enough():
    _, errors = attach(transplant(random_qwen3(0))[0], some_tokens(1, 16))
    assert all(0 < error < 1 for error in errors)


def test_relative_error_is_one_for_silence_and_zero_for_the_target():
    target = torch.randn(2, 5, 8)
    assert relative_error(torch.zeros_like(target), target) == 1
    assert relative_error(target, target) == 0
    assert relative_error(2 * target, target).item() == pytest.approx(1)
    assert relative_error(target.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_without_gates_it_is_the_host(morphable):
    full = morphable.instantiate(plan_of(morphable, [0, 1, 2]))
    with torch.no_grad():
        assert torch.equal(morphable.model.lm_head(morphable(some_tokens())), logits(full, some_tokens()))


@pytest.mark.parametrize("grad", [False, True], ids=["one branch runs", "all branches run"])
def test_gates_that_are_all_full_give_exactly_the_hosts_logits(grad):
    model, _ = transplant(random_qwen3(1, num_hidden_layers=LAYERS))
    expected = logits(model, some_tokens())
    morphable, _ = attach(model, some_tokens())
    with torch.set_grad_enabled(grad):
        found = morphable.model.lm_head(morphable(some_tokens(), gates_of(morphable, [0, 1, 2])))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grad", [False, True], ids=["one branch runs", "all branches run"])
@pytest.mark.parametrize("layers", PLANS, ids=str)
def test_one_hot_gates_give_the_built_models_logits(morphable, layers, grad):
    built = morphable.instantiate(plan_of(morphable, layers))
    with torch.set_grad_enabled(grad):
        found = morphable.model.lm_head(morphable(some_tokens(), gates_of(morphable, layers)))
    assert close(found, logits(built, some_tokens()))


def test_plans_differ_in_what_they_compute(morphable):
    found = [logits(morphable.instantiate(plan_of(morphable, layers)), some_tokens()) for layers in PLANS]
    for one, other in itertools.combinations(found, 2):
        assert not close(one, other)


def test_soft_gates_mix_the_branches_outputs(morphable):
    """With all layers but the last at full, the mixture there is linear in its gate."""
    seen: list[torch.Tensor] = []

    def keep(layer, hidden, arguments, output):
        seen.append(output)

    with torch.no_grad():
        for share in (1.0, 0.0, 0.3):
            gates = gates_of(morphable, [0, 1, 2])
            gates[2] = torch.tensor([share, 1 - share])
            morphable(some_tokens(), gates, observer=keep)
    full, linear, mixed = seen[2], seen[5], seen[8]
    assert close(mixed, 0.3 * full + 0.7 * linear)
    assert not close(mixed, full)


@pytest.mark.parametrize("layers", PLANS, ids=str)
def test_every_gate_has_a_gradient_under_every_hard_plan(morphable, layers):
    gates = gates_of(morphable, layers).requires_grad_(True)
    morphable(some_tokens(), gates).square().mean().backward()
    assert gates.grad is not None and torch.isfinite(gates.grad).all()
    assert (gates.grad.abs() > 0).all()


def test_learning_gates_computes_no_gradient_of_weights():
    morphable = small_morphable(2, num_hidden_layers=LAYERS)
    gates = gates_of(morphable, [1]).requires_grad_(True)
    morphable(some_tokens(), gates).square().mean().backward()
    assert gates.grad is not None
    assert [name for name, weight in morphable.named_parameters() if weight.grad is not None] == []


def test_the_published_gate_has_a_gradient_at_its_start(morphable):
    alpha = torch.ones(LAYERS, requires_grad=True)
    morphable(some_tokens(), torch.stack([alpha, 1 - alpha], 1)).square().mean().backward()
    assert (alpha.grad.abs() > 0).all()


def test_a_gates_gradient_is_the_slope_of_the_loss(morphable):
    def loss(gates):
        # Tokens at which no expert changes within the step.
        return morphable(some_tokens(1, 20, seed=3), gates).double().square().mean()

    gates = torch.full((LAYERS, 2), 0.5, requires_grad=True)
    loss(gates).backward()
    step = 2e-3
    for place in itertools.product(range(LAYERS), range(2)):
        up, down = gates.detach().clone(), gates.detach().clone()
        up[place] += step
        down[place] -= step
        with torch.no_grad():
            slope = (loss(up) - loss(down)) / (2 * step)
        assert gates.grad[place].item() == pytest.approx(
            slope.item(), rel=0.02, abs=0.01 * gates.grad.abs().max().item()
        )


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 1, 2], []], ids=str)
def test_a_built_model_is_opened_by_stock_transformers(morphable, tmp_path, layers):
    built = morphable.instantiate(plan_of(morphable, layers))
    built.save_pretrained(tmp_path)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(opened) is morphable.host.model_class
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    words = ["full_attention" if layer in layers else "linear_attention" for layer in range(LAYERS)]
    assert opened.config.layer_types == words
    assert opened.config.use_cache
    assert torch.equal(logits(opened.eval(), some_tokens()), logits(built, some_tokens()))


def test_a_built_model_has_weights_of_its_own(morphable):
    first, second = (morphable.instantiate(plan_of(morphable, [1])) for _ in range(2))
    before = logits(second, some_tokens())
    assert all(weight.requires_grad for weight in first.parameters())
    with torch.no_grad():
        for weight in first.parameters():
            weight.fill_(0.5)
    assert torch.equal(logits(second, some_tokens()), before)
    with torch.no_grad():
        assert torch.isfinite(morphable(some_tokens())).all()
    assert torch.equal(logits(morphable.instantiate(plan_of(morphable, [1])), some_tokens()), before)


def test_a_plan_is_read_by_the_names_of_its_groups(morphable):
    plan = plan_of(morphable, [0])
    turned = Plan(dict(reversed(plan.assignments.items())), plan.budget)
    built = morphable.instantiate(turned)
    assert built.config.layer_types == ["full_attention", "linear_attention", "linear_attention"]
    assert turned.full_layers == [0]
    assert turned.strip() == "■□□"


def test_a_plan_for_another_model_is_not_built(morphable):
    for assignments in (
        {f"layers.{layer}": FULL for layer in range(LAYERS + 1)},
        {f"layers.{layer}": "sliding" for layer in range(LAYERS)},
    ):
        with pytest.raises(UserError):
            morphable.instantiate(Plan(assignments, Budget("layers", 1)))


def test_branches_survive_their_state(morphable):
    other = Morphable(transplant(random_qwen3(2, num_hidden_layers=LAYERS))[0])
    fresh = small_morphable(2, num_hidden_layers=LAYERS)
    state = {name: weight.clone() for name, weight in fresh.branch_state().items()}
    other.load_branch_state(state)
    gates = gates_of(other, [1])
    with torch.no_grad():
        assert torch.equal(other(some_tokens(), gates), fresh(some_tokens(), gates))
    assert all(name.startswith("layers.") and ".linear." in name for name in state)
    with pytest.raises(KeyError):
        other.load_branch_state({})


@pytest.mark.parametrize("layers", PLANS, ids=str)
def test_a_later_token_changes_nothing_before_it(morphable, layers):
    built = morphable.instantiate(plan_of(morphable, layers))
    ids = some_tokens()
    for place in (1, 40, 64, 69):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % 97
        before, after = logits(built, ids), logits(built, changed)
        assert close(after[:, :place], before[:, :place])
        assert not close(after[:, place:], before[:, place:])


@pytest.mark.parametrize("layers", WITH_FULL, ids=str)
@pytest.mark.parametrize("prompt", [1, 65])
def test_decoding_with_the_cache_gives_the_parallel_logits(morphable, layers, prompt):
    built = morphable.instantiate(plan_of(morphable, layers))
    ids = some_tokens(2, prompt + 6)
    expected = logits(built, ids)
    cache = DynamicCache(config=built.config)
    with torch.no_grad():
        found = [built(input_ids=ids[:, :prompt], use_cache=True, **{CACHE: cache}).logits]
        for place in range(prompt, ids.shape[1]):
            found.append(built(input_ids=ids[:, place : place + 1], use_cache=True, **{CACHE: cache}).logits[:, -1:])
    assert close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("layers", [[0], [2], [0, 1, 2]], ids=str)
def test_greedy_generation_with_the_cache_is_recomputation_without(morphable, layers):
    built = morphable.instantiate(plan_of(morphable, layers))
    ids = some_tokens(2, 20)
    generated = built.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    for _ in range(8):
        ids = torch.cat([ids, logits(built, ids)[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == ids.tolist()


@pytest.mark.parametrize("layers", PLANS, ids=str)
def test_padding_on_the_left_changes_nothing(morphable, layers):
    built = morphable.instantiate(plan_of(morphable, layers))
    ids, mask = some_tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    paddings = (0, 1, 66)
    for row, padding in enumerate(paddings):
        ids[row, :padding], mask[row, :padding] = 5, 0
    found = logits(built, ids, attention_mask=mask)
    for row, padding in enumerate(paddings):
        assert close(found[row, padding:], logits(built, ids[row : row + 1, padding:])[0])


@pytest.mark.parametrize("layers", [[0], [0, 2]], ids=str)
def test_a_padded_batch_generates_what_each_row_generates_alone(morphable, layers):
    built = morphable.instantiate(plan_of(morphable, layers))
    ids, mask = some_tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    paddings = (0, 1, 66)
    for row, padding in enumerate(paddings):
        ids[row, :padding], mask[row, :padding] = 5, 0
    together = built.generate(ids, attention_mask=mask, **settings)[:, -4:]
    for row, padding in enumerate(paddings):
        alone = ids[row : row + 1, padding:]
        alone = built.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert together[row].tolist() == alone[0, -4:].tolist()


def test_a_cache_handed_to_a_morphable_model_is_refused(morphable):
    with pytest.raises(ValueError, match="no cache"):
        morphable.model(input_ids=some_tokens(), **{CACHE: DynamicCache(config=morphable.model.config)})
    with pytest.raises(ValueError, match="no cache"):
        morphable.model.generate(some_tokens(), max_new_tokens=2, do_sample=False, use_cache=True, pad_token_id=0)


def real_cache_bytes(model, tokens: int) -> int:
    """The bytes of all tensors in the cache after one sequence of `tokens` tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=some_tokens(1, tokens), use_cache=True, **{CACHE: cache})
    found = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [[0], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tokens", [2, 70])
def test_cache_bytes_are_those_of_a_real_cache(morphable, tmp_path, dtype, layers, tokens):
    morphable.instantiate(plan_of(morphable, layers)).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert model.dtype == dtype
    options = plan_of(morphable, layers).assignments.values()
    counted = sum(morphable.host.mixers[option].cache_bytes(model.config, tokens) for option in options)
    assert counted == real_cache_bytes(model, tokens)


def test_a_budget_in_bytes_costs_what_the_checkpoint_will_cost(tmp_path):
    """A CPU computes in float32; the hybrid is saved in the teacher's bfloat16, and so is the cache of who uses it."""
    random_qwen3(0).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    model, _ = transplant(load_model(tmp_path / "teacher", torch.float32))
    save_model(model, tmp_path / "host", tmp_path / "teacher")
    morphable = Morphable(load_model(tmp_path / "host", torch.float32))
    space = morphable.space(Budget.parse("kv=1MiB@70"))
    for layers in ([0, 1], [0]):
        built = morphable.instantiate(plan_of(morphable, layers))
        save_model(built, tmp_path / str(layers), tmp_path / "host")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(layers), dtype="auto")
        assert (space.one_hot(plan_of(morphable, layers)) * space.cost).sum() == real_cache_bytes(saved, 70)


def test_a_space_in_bytes_has_the_groups_of_a_space_of_layers(morphable):
    layers, kv = morphable.space(Budget.parse("1")), morphable.space(Budget.parse("kv=1MiB@70"))
    assert layers.groups == kv.groups == ("layers.0", "layers.1", "layers.2")
    assert layers.options == kv.options == (FULL, "linear")
    assert (kv.cost[:, 0] == morphable.host.mixers[FULL].cache_bytes(morphable.model.config, 70)).all()
