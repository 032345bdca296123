"""What `flashmorph estimate` says is what real models have and do."""

import json
import math
import re
import time

import pytest
import torch
from conftest import random_qwen3, run_command
from families import config_of, random_teacher
from torch.utils.flop_counter import FlopCounterMode

import flashmorph.model.recompute
from flashmorph.convert.in_memory import transplant
from flashmorph.convert.teacher import open_config
from flashmorph.devices import usable
from flashmorph.errors import UserError
from flashmorph.estimate import Estimate, estimate, find_gpu
from flashmorph.estimate.auto import HEAVY
from flashmorph.estimate.memory import stage_memory
from flashmorph.estimate.sizes import count_sizes
from flashmorph.estimate.work import Model, body_forward, model_of
from flashmorph.hosts import FEED_FORWARD, WINDOW_HOSTS, cache_by_context, cache_bytes, configure, use_kernels
from flashmorph.mixers import SLIDING
from flashmorph.model.morphable import Morphable, attach, build
from flashmorph.plan import FULL, Budget
from flashmorph.recipe.recipe import Recipe, load_recipe, with_settings
from flashmorph.selection.racing import start_questions
from flashmorph.stages.align import AlignmentLoss
from flashmorph.stages.distill import DistillationLoss
from flashmorph.stages.extend import NextTokenLoss
from flashmorph.units import longest_context

LENGTH, ROWS, KEPT = 128, 2, 1
SCORES = "scores, values"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
STEP = {"tokens": ROWS * LENGTH, "length": LENGTH, "batch_tokens": ROWS * LENGTH}
RECIPE = load_recipe(
    "demo",
    {
        "budget": str(KEPT),
        "baseline": None,
        "select.search": {"length": LENGTH, "batch_tokens": ROWS * LENGTH},
        "select.settings": {"steps": 1, "swaps": 0},
        "evaluate.length": LENGTH,
        **{f"{stage}.{name}": value for stage in ("align", "distill", "extend") for name, value in STEP.items()},
    },
)


CASES = {
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3},
    "llama": {},
    "qwen3, window": {},
}
"""Every host, and a window as long as the rows, whose scores FlopCounterMode counts alike."""


def recipe_of(case: str, window: int = LENGTH) -> Recipe:
    return RECIPE.model_copy(update={"host": {"window": window} if case.endswith("window") else {}})


def teacher_of(case: str):
    family = case.partition(",")[0]
    return random_teacher(f"{family}: grouped", **SHAPE, **CASES[case])


def expected(case: str = "qwen3", **options) -> Estimate:
    config = config_of(f"{case.partition(',')[0]}: grouped", **SHAPE, **CASES[case])
    return estimate("random", config, recipe_of(case), **options)


def depthwise_backward(grad_shape, x_shape, w_shape, *args, out_shape, **kwargs) -> int:
    """Twice the forward. FlopCounterMode's own formula takes the gradient of a depthwise kernel for that of a dense
    one, `channels` times too much."""
    return 2 * 2 * math.prod(x_shape) * w_shape[-1]


def counted(work) -> int:
    formulas = {torch.ops.aten.convolution_backward: depthwise_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture
def models(case):
    """A morphable model and a hybrid of one teacher; attention and experts as FlopCounterMode counts them."""
    host, _ = transplant(teacher_of(case), recipe_of(case).host)
    ids = torch.randint(SHAPE["vocab_size"], (ROWS, LENGTH))
    morphable, _ = attach(host, ids)
    budget = Budget("layers", KEPT)
    hybrid = morphable.instantiate(morphable.space(budget).plan(["layers.1"], budget))
    return counts_all(morphable), counts_all(hybrid), ids


def counts_all(model):
    """Makes `model` run what FlopCounterMode can count."""
    inner = model.model if isinstance(model, Morphable) else model
    inner.set_attn_implementation("eager")
    if getattr(inner.config, "num_experts", 0):
        inner.set_experts_implementation("eager")
    return model


def stage_of(found: Estimate, name: str):
    return next(stage for stage in found.stages if stage.name == name)


def test_parameters_are_those_of_the_real_models(case, models):
    morphable, hybrid, _ = models
    found = expected(case)
    assert found.sizes.teacher == teacher_of(case).num_parameters()
    assert found.hybrid_parameters == hybrid.num_parameters()
    branches = sum(len(weight.flatten()) for weights in morphable.branch_parameters() for weight in weights)
    assert found.sizes.branches == branches
    assert found.sizes.host == sum(weight.numel() for weight in morphable.parameters()) - branches


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_the_head_counts_once(tied):
    model = random_qwen3(**SHAPE, tie_word_embeddings=tied)
    found = estimate("random", model.config, RECIPE)
    assert found.sizes.teacher == model.num_parameters()
    assert found.sizes.host == transplant(model)[0].num_parameters()


def test_the_cache_is_that_of_the_real_models(case, models):
    _, hybrid, _ = models
    found = expected(case, contexts=(LENGTH, 4096))
    for context, (teacher, after) in found.cache.items():
        assert teacher == cache_bytes(configure(teacher_of(case).config, recipe_of(case).host)[1], context)
        assert after == cache_bytes(hybrid.config, context)
    assert after < teacher


@pytest.mark.parametrize("length", [100, LENGTH])
def test_a_forward_takes_the_operations_that_are_counted(case, models, length):
    morphable, hybrid, ids = models
    ids = ids[:, :length]
    model = expected(case).model
    for real, kept in ((hybrid, KEPT), (morphable.model, model.layers)):
        found = counted(lambda real=real: real.model(input_ids=ids, use_cache=False))
        assert body_forward(model._replace(kept=kept), length)[0] * ids.numel() == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("stage", ["align", "select", "distill", "extend"])
def test_a_step_of_each_stage_takes_the_operations_that_are_counted(case, models, stage):
    morphable, hybrid, ids = models
    work = stage_of(expected(case), stage).work
    if stage == "align" and case.endswith("window"):
        assert work == (0, [])
        return
    for weights in morphable.branch_parameters() if stage == "align" else ():
        for weight in weights:
            weight.requires_grad_(True)
    teacher = counts_all(transplant(teacher_of(case), recipe_of(case).host)[0])
    gates = torch.full((SHAPE["num_hidden_layers"], 2), 0.5, requires_grad=True)
    loss = {
        "align": lambda: AlignmentLoss(morphable, recompute=False)(ids)["loss"],
        "select": lambda: morphable(ids, gates).square().mean(),
        "distill": lambda: DistillationLoss(hybrid, teacher)(ids)["loss"],
        "extend": lambda: NextTokenLoss(hybrid)(ids)["loss"],
    }[stage]
    assert work.tokens == ids.numel()
    assert work.flops == pytest.approx(counted(lambda: loss().backward()), rel=0.02)
    # On so few channels what kernels of Mamba2 do more, in longer chunks, outweighs what they leave out.
    assert work.causal < work.flops or case.startswith("llama")


def test_a_search_that_runs_layers_again_takes_the_operations_that_are_counted(case, models, monkeypatch):
    monkeypatch.setattr(flashmorph.model.recompute, "KEPT_BYTES", 0)
    morphable, _, ids = models
    gates = torch.full((SHAPE["num_hidden_layers"], 2), 0.5, requires_grad=True)
    work = stage_of(expected(case), "select").work
    found = counted(lambda: morphable(ids, gates).square().mean().backward())
    assert work.flops == pytest.approx(found, rel=0.02)


@torch.no_grad()
def test_races_at_the_end_of_a_search_ask_a_few_plans_a_few_questions(case, models):
    """Two rounds, each of a step and of all plans that exchange a layer; in the first, of the plan itself too."""
    _, hybrid, ids = models
    chosen = recipe_of(case).select.model_copy(update={"settings": {"steps": 1, "swaps": 2}})
    config = config_of(f"{case.partition(',')[0]}: grouped", **SHAPE, **CASES[case])
    raced = stage_of(estimate("random", config, recipe_of(case).model_copy(update={"select": chosen})), "select").work
    before = stage_of(expected(case), "select").work
    row = counted(lambda: hybrid.model(input_ids=ids, use_cache=False)) / ROWS
    plans = 1 + 2 * KEPT * (SHAPE["num_hidden_layers"] - KEPT)
    tasks = len(recipe_of(case).tasks)
    steps = 1 + 2 * max(ROWS, tasks) / ROWS  # A round's step has a row of each task at least.
    assert raced.tokens == steps * before.tokens
    assert raced.flops == pytest.approx(steps * before.flops + plans * start_questions(tasks) * row / 2, rel=0.02)


@torch.no_grad()
def test_mamba_takes_the_operations_that_are_counted_also_over_many_chunks():
    length = 200
    model, _ = transplant(teacher_of("llama"))
    own = model.config
    own.mamba_chunk_size = 16
    hybrid = counts_all(attach(model, torch.randint(SHAPE["vocab_size"], (ROWS, 32)))[0])
    plan = hybrid.space(Budget("layers", 1)).plan([], Budget("layers", 1))
    ids = torch.randint(SHAPE["vocab_size"], (1, length))
    found = counted(lambda: counts_all(hybrid.instantiate(plan)).model(input_ids=ids, use_cache=False))
    expected_there = Model(hybrid.host, own, 0)
    assert body_forward(expected_there, length)[0] * length == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("window", [2, 16, 100, LENGTH, 200])
def test_of_a_window_only_what_it_sees_is_counted(window):
    """Eager attention computes all scores and hides those outside."""
    _, own = configure(teacher_of("qwen3, window").config, {"window": window})
    model = Model(WINDOW_HOSTS[0], own, 0)
    scores, full = ({each.name: each for each in model.part(option, LENGTH)}[SCORES] for option in (SLIDING, FULL))
    one = full.flops / LENGTH
    assert scores.flops == one * min(window, LENGTH)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    for product, width in ((scores, min(window, LENGTH)), (full, LENGTH)):
        inside = int(((distance >= 0) & (distance < width)).sum())
        # The diagonal counts half, as where causal attention is taken for half of all scores.
        assert product.flops * product.causal * LENGTH == pytest.approx(one * (inside - width / 2))


@pytest.mark.parametrize("expand", [1, 2])
def test_settings_of_a_host_are_kept(expand):
    recipe = RECIPE.model_copy(update={"host": {"mamba_expand": expand}})
    found = estimate("random", teacher_of("llama").config, recipe)
    host, _ = transplant(teacher_of("llama"), recipe.host)
    morphable, _ = attach(host, torch.randint(SHAPE["vocab_size"], (ROWS, 32)))
    budget = Budget("layers", KEPT)
    assert (
        found.hybrid_parameters == build(morphable, morphable.space(budget).plan(["layers.1"], budget)).num_parameters()
    )
    with pytest.raises(UserError, match="host.mamba_expand must be 1 or 2"):
        estimate("random", teacher_of("llama").config, RECIPE.model_copy(update={"host": {"mamba_expand": 3}}))


def test_of_experts_a_token_reads_and_keeps_those_that_it_goes_through():
    every = CASES["qwen3_moe"]
    found, dense = expected("qwen3_moe"), expected("qwen3")
    feed_forward, own = found.sizes.parts[FEED_FORWARD], found.model.config
    one = 3 * SHAPE["hidden_size"] * every["moe_intermediate_size"]
    assert feed_forward.idle == (every["num_experts"] - every["num_experts_per_tok"]) * one
    assert found.sizes.idle == SHAPE["num_hidden_layers"] * feed_forward.idle and not dense.sizes.idle
    inner, width = every["moe_intermediate_size"], SHAPE["hidden_size"]
    gated = inner
    assert feed_forward.expert_widths == every["num_experts_per_tok"] * (2 * inner + width + gated + width + inner)
    shared = 3 * (width + own.shared_expert_intermediate_size)
    assert feed_forward.widths == shared + (width + every["num_experts"]) + (width + 1)
    told = expected("qwen3_moe", gpu=find_gpu("h200"))
    looked_up = 0 if own.tie_word_embeddings else own.vocab_size * width
    read = found.weight_bytes(found.sizes.teacher - found.sizes.idle - looked_up)
    assert told.seconds_per_token(found.sizes.teacher, 0) == pytest.approx(read / 4.8e12)


def kept_bytes(model, ids: torch.Tensor, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward, weights in any form left out."""
    shapes = [weight.shape for weight in model.parameters()]
    weights = {*shapes, *((*shape[:-2], *shape[-2:][::-1]) for shape in shapes)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model.model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bf16", [True, False])
def test_memory_of_a_full_layer_is_about_what_autograd_keeps(bf16):
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    ids = torch.randint(SHAPE["vocab_size"], (1, 200))
    found = []
    for layers in (2, 4):
        model, _ = transplant(random_qwen3(**{**shape, "num_hidden_layers": layers}))
        found.append(kept_bytes(model, ids, bf16))
    plan = estimate("random", random_qwen3(**shape).config, RECIPE)
    all_full = plan.model._replace(kept=plan.model.layers)
    per_token = stage_memory(all_full, plan.sizes, RECIPE, 1, bf16)["extend"].per_token / plan.model.layers
    assert per_token == pytest.approx((found[1] - found[0]) / 2 / ids.numel(), rel=0.15)


@pytest.mark.parametrize("bf16", [True, False])
def test_memory_of_experts_is_about_what_autograd_keeps(bf16):
    """Of one layer, whose experts' grouped products are not linear maps of their own."""
    shape = {**SHAPE, "hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 8}
    ids = torch.randint(SHAPE["vocab_size"], (1, 200))
    for chosen in (1, 4):
        found = []
        for layers in (2, 4):
            teacher = random_teacher(
                "qwen3_moe: grouped", **{**shape, "num_hidden_layers": layers, "num_experts_per_tok": chosen}
            )
            found.append(kept_bytes(transplant(teacher)[0], ids, bf16))
        config = config_of("qwen3_moe: grouped", **{**shape, "num_experts_per_tok": chosen})
        plan = estimate("random", config, RECIPE)
        all_full = plan.model._replace(kept=plan.model.layers)
        per_token = stage_memory(all_full, plan.sizes, RECIPE, 1, bf16)["extend"].per_token / plan.model.layers
        assert per_token == pytest.approx((found[1] - found[0]) / 2 / ids.numel(), rel=0.15), chosen


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("family", ["qwen3: grouped", "llama: grouped"])
def test_memory_of_a_linear_layer_on_a_cpu_is_about_what_autograd_keeps(family, bf16):
    """PyTorch's references keep several times what kernels keep; on a GPU with kernels that is not counted."""
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    ids = torch.randint(SHAPE["vocab_size"], (1, 320))
    found = []
    for layers in (2, 4):
        host, own = configure(config_of(family, **{**shape, "num_hidden_layers": layers}))
        use_kernels(host.model_type)
        model = host.model_class(host.with_plan(own, ["linear"] * layers)).float()
        found.append(kept_bytes(model, ids, bf16))
    config = config_of(family, **shape)
    model = model_of(config, RECIPE)._replace(kept=0)
    kept, by_kernels = (
        stage_memory(model, count_sizes(model.host, config, model.config, device), RECIPE, 1, bf16)["extend"].per_token
        for device in (torch.device("cpu"), None)
    )
    assert kept / model.layers == pytest.approx((found[1] - found[0]) / 2 / ids.numel(), rel=0.15)
    assert by_kernels < 0.7 * kept


QWEN3_1_7B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


def test_the_search_on_a_1_7b_at_8k_tokens_fits_24_gb(tmp_path, capsys):
    type(random_qwen3().config)(**QWEN3_1_7B, dtype="bfloat16").save_pretrained(tmp_path)
    at_8k = ("--set", "select.search.length=8192", "--set", "select.search.micro_batch_tokens=8192")
    options = ("estimate", tmp_path, "--budget", "7", "--gpu", "rtx4090", *at_8k)
    assert run_command(*options, "--json") == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert 8e9 < stages["select"]["memory_bytes"] < find_gpu("rtx4090").memory_bytes
    assert run_command(*options, "--explain") == 0
    printed = capsys.readouterr().out
    assert "distill does not fit" in printed and "select does not fit" not in printed
    assert "2 · branches / layers" in printed and "every branch again, in the backward" in printed


@pytest.mark.parametrize("name, gpus", [("a100-40gb", 1), ("l4", 8)])
def test_what_it_says_to_lower_makes_a_stage_fit(name, gpus):
    shape = {**SHAPE, "hidden_size": 2048, "num_hidden_layers": 28, "head_dim": 128, "intermediate_size": 6144}
    config = type(random_qwen3().config)(**shape, dtype="bfloat16")
    whole = {f"{stage}.micro_batch_tokens": None for stage in ("align", "distill", "extend")}
    whole |= {f"{stage}.activation_checkpointing": False for stage in ("distill", "extend")}
    recipe = load_recipe("default", {"evaluate.length": 16384, **whole})
    gpu = find_gpu(name)
    found = estimate("random", config, recipe, gpu, gpus)
    settled = 0
    for stage in found.stages:
        if stage.memory and stage.memory.tokens and stage.memory.bytes(gpus) > gpu.memory_bytes:
            tokens = stage.memory.tokens_within(gpu.memory_bytes, gpus)
            if tokens:
                settled += 1
                lowered = load_recipe("default", {**whole, stage.memory.setting: tokens})
                again = stage_of(estimate("random", config, lowered, gpu, gpus), stage.name)
                assert again.memory.bytes(gpus) <= gpu.memory_bytes
    assert settled


def test_hours_follow_from_operations_and_gpus():
    one, two = expected(gpu=find_gpu("H200")), expected(gpu=find_gpu("h200"), num_gpus=2, utilisation=0.6)
    for stage, other in zip(one.stages, two.stages, strict=True):
        if one.hours(stage):
            assert one.hours(stage) == pytest.approx(4 * two.hours(other))
    align = stage_of(one, "align")
    assert one.hours(align) == pytest.approx(align.work.causal / 0.3 / 989e12 / 3600)
    assert one.hours(stage_of(one, "evaluate")) is None and expected().hours(align) is None
    assert one.total_hours == pytest.approx(sum(filter(None, map(one.hours, one.stages)))) and one.total_hours > 0
    assert expected().total_hours is None


@pytest.fixture
def large(tmp_path):
    """A folder with the configuration of a 70B model, and nothing else."""
    shape = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = type(random_qwen3().config)(
        **shape,
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_the_fewest_gpus_are_the_first_that_nothing_is_too_large_for(large):
    """Also where some numbers cannot share a batch; on fewer something does not fit, whatever is asked for."""
    config, gpu = open_config(str(large)), find_gpu("h200")
    config.num_hidden_layers, config.layer_types = 24, config.layer_types[:24]
    recipe = load_recipe("default", {"distill.batch_tokens": 48 * 512, "extend.batch_tokens": 48 * 16_384})
    found = estimate("large", config, recipe, gpu)
    least = found.least_gpus
    assert least and least > 1 and estimate("large", config, recipe, gpu, 2).least_gpus == least

    def fits(number: int) -> bool:
        stages = estimate("large", config, recipe, gpu, number).stages
        heavy = [stage.memory for stage in stages if stage.memory and stage.name in HEAVY]
        return all(memory.tokens_within(usable(gpu.memory_bytes), number) for memory in heavy)

    assert fits(least) and not fits(least // 2)
    assert estimate("large", config, with_settings(recipe, {"shard": False}), gpu).least_gpus is None
    assert expected(gpu=gpu).least_gpus == 1 and expected().least_gpus is None


def test_a_gpu_that_there_is_not_is_told_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'h200'"):
        find_gpu("h20o")


def test_a_70b_configuration_is_enough(large, capsys):
    started = time.process_time()
    assert run_command("estimate", large, "--budget", "25%", "--gpu", "h200", "--gpus", "8", "--json") == 0
    assert time.process_time() - started < 10
    found = json.loads(capsys.readouterr().out)
    assert found["full_layers"] == 20 and found["models"]["teacher"]["parameters"] == 72_703_307_776
    assert (
        found["models"]["hybrid"]["cache_bytes"]["131072"] < 0.26 * found["models"]["teacher"]["cache_bytes"]["131072"]
    )
    assert run_command("estimate", large, "--gpu", "h200", "--gpus", "8") == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 40 and "distill does not fit" in printed


@pytest.mark.parametrize("more", [(), ("--window", "16")])
def test_plan_and_dry_run_say_the_same(teacher_folder, recipe_file, tmp_path, capsys, more):
    options = (teacher_folder, "--recipe", recipe_file, "--json", *more)
    assert run_command("estimate", *options) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert run_command("morph", *options, "--output", tmp_path / "out", "--dry-run") == 0
    dry = json.loads(capsys.readouterr().out)
    assert [{name: stage[name] for name in dry[0]} for stage in planned] == dry


@pytest.mark.parametrize("more", [(), ("--window", "16")])
def test_explain_ends_in_the_figures_of_the_tables(teacher_folder, recipe_file, capsys, more):
    options = ("estimate", teacher_folder, "--recipe", recipe_file, "--gpu", "l4", "--gpus", "2", *more)
    assert run_command(*options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run_command(*options, "--explain") == 0
    printed = capsys.readouterr().out
    for model in found["models"].values():
        assert f"{model['parameters']:,}" in printed and f"{model['cache_bytes']['8192']:,}" in printed
    assert re.search(r"^ all .* < 0\.1 ", printed, re.MULTILINE) and found["hours"] < 0.05
    assert "Smallest --gpus that fits a row of every stage that trains or searches: 1." in printed
    for stage in found["stages"]:
        assert not stage["memory_bytes"] or f"{stage['memory_bytes']:,.0f}" in printed


@pytest.mark.parametrize(
    "options, says",
    [
        (["--strategy", "tolerance"], "finds the number of full layers only as it trains: estimate with another one"),
        (["--budget", "2"], "everything full"),
        (["--gpu", "h2000"], "did you mean 'h200'"),
        (["--contexts", "8k"], "must be whole numbers"),
        (["--data", "nothere.txt"], "there is no file or folder 'nothere.txt'"),
    ],
)
def test_bad_input_is_one_sentence(teacher_folder, recipe_file, capsys, options, says):
    assert run_command("estimate", teacher_folder, "--recipe", recipe_file, *options) == 2
    assert says in capsys.readouterr().err


def test_text_changes_no_cost_and_that_is_said(teacher_folder, recipe_file, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A text.")
    options = ("estimate", teacher_folder, "--recipe", recipe_file, "--json")
    assert run_command(*options) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run_command(*options, "--data", tmp_path / "text.txt") == 0
    printed = capsys.readouterr()
    assert f"`morph --dry-run` measures {tmp_path / 'text.txt'}" in printed.err
    with_text = json.loads(printed.out)
    for each in (*plain["stages"], *with_text["stages"]):
        each.pop("data")
    assert with_text == plain


def test_bytes_of_cache_become_a_number_of_layers():
    config = random_qwen3(**SHAPE).config
    one = cache_bytes(config, 4096) // SHAPE["num_hidden_layers"]
    found = estimate("random", config, load_recipe("demo", {"budget": f"kv={2.5 * one}B@4096", "evaluate.length": 256}))
    assert found.model.num_full == 2
    assert estimate("random", config, RECIPE, contexts=(4096,)).cache[4096][1] <= found.cache[8192][1]


@pytest.mark.parametrize(
    ("limit", "contexts"),
    [(256, [512]), (512, [512]), (8192, [512, 8192]), (40_960, [512, 8192, 40_960]), (10**6, [512, 8192, 131_072])],
)
def test_caches_are_given_at_contexts_that_the_model_has(limit, contexts):
    _, config = configure(config_of("qwen3: grouped", max_position_embeddings=limit))
    assert cache_by_context(config) == {str(context): cache_bytes(config, context) for context in contexts}
    assert longest_context([cache_by_context(config), {"512": 1, "8192": 2}]) == str(min(8192, contexts[-1]))
