"""Bench: what growth, crossings and limits are; that caches have the size that arithmetic says; the command."""

import json
import math
import sys
import types

import pytest
import torch
from conftest import SHAPE, run_command
from kernel_names import kernels_of, triton_functions
from pydantic import ValidationError
from test_cli import broken_copy, refused
from transformers import Qwen3Config

from flashmorph.bench import BenchSettings, Limit, Rates, bench, crossing, exponent, measure_rates
from flashmorph.evaluation import GridSettings
from flashmorph.hosts import cache_by_layer, host_for, mixing_operations
from flashmorph.mixers import LINEAR
from flashmorph.plan import FULL
from flashmorph.referee import CompareSettings

LENGTHS = (24, 48, 96)


def host_model(*options: str):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=97, dtype=torch.float32, **SHAPE)
    host = host_for(config)
    return host.model_class(host.with_plan(host.config(config), list(options))).eval()


@pytest.fixture(scope="module")
def pair():
    return {"full": host_model(FULL, FULL), "hybrid": host_model(LINEAR, FULL)}


@pytest.mark.parametrize(
    "settings, values",
    [
        (BenchSettings, {"repeats": True}),
        (GridSettings, {"lengths": (64,), "depths": True}),
        (CompareSettings, {"seeds": True}),
        (CompareSettings, {"spends": (math.nan,)}),
        (CompareSettings, {"spends": (math.inf,)}),
        (BenchSettings, {"repeat": 3}),
    ],
)
def test_settings_refuse_truth_values_and_numbers_that_are_not_finite(settings, values):
    """As a recipe does: true would be one round, and nan a share that is neither above nor below another."""
    with pytest.raises(ValidationError):
        settings(**values)


def test_growth_is_the_slope_of_the_logarithms():
    lengths = [100, 200, 400, 800]
    assert exponent(lengths, [length**1.5 for length in lengths]) == pytest.approx(1.5)
    assert exponent([100], [3.0]) is None


def test_a_crossing_is_the_last_one_and_between_lengths():
    lengths = [100, 200, 400]
    assert crossing(lengths, [0.9, 0.8, 0.7]) == 100
    assert crossing(lengths, [2.0, 1.5, 1.0]) is None
    assert crossing(lengths, [0.5, 2.0, 0.5]) == pytest.approx(math.sqrt(200 * 400))
    assert crossing(lengths, [2.0, 0.5, 0.25]) == pytest.approx(math.sqrt(100 * 200))


def test_caches_are_as_large_as_arithmetic_says(pair):
    found = bench(pair, BenchSettings(lengths=LENGTHS, repeats=2, decode_tokens=2))
    for name, model in pair.items():
        for row in found["models"][name]["cache"]:
            assert row["by_layer"] == cache_by_layer(model.config, row["length"]) == row["expected_by_layer"]
    hybrid = found["models"]["hybrid"]
    ratios = [row["of_first"] for row in hybrid["cache"]]
    assert ratios == sorted(ratios, reverse=True)
    assert len(hybrid["prefill"]["of_first"]) == 3 and "of_first" not in found["models"]["full"]["prefill"]
    for kind in ("prefill", "decode"):
        for row in hybrid[kind]["by_length"]:
            assert 0 < row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
            assert row["limit"] > 0


def test_every_model_has_its_turn_in_each_round(pair):
    order = []
    handles = [
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: order.append(name) if kwargs["input_ids"].shape[1] > 1 else None,
            with_kwargs=True,
        )
        for name, model in pair.items()
    ]
    bench(pair, BenchSettings(lengths=(16,), repeats=2, decode_tokens=1))
    for handle in handles:
        handle.remove()
    assert order == ["full", "hybrid", "hybrid", "full", "full", "hybrid"]


def test_the_limit_counts_weights_cache_and_mixers(pair):
    full, hybrid = pair["full"], pair["hybrid"]
    by_bytes, by_operations = Rates(1.0, 1e30), Rates(1e30, 1.0)
    weights = sum(weight.numel() * 4 for weight in full.parameters())
    cache = 2 * 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4
    assert Limit(full, by_bytes).decode(100) == weights + 100 * cache
    matrices = sum(weight.numel() for weight in full.parameters() if weight.ndim == 2)
    heads = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    assert Limit(full, by_operations).decode(100) == 2 * matrices + 2 * 4 * heads * 100
    head = full.lm_head.weight.numel()
    seen = sum(range(1, 100))
    assert Limit(full, by_operations).prefill(99) == 2 * 99 * (matrices - head) + 2 * head + 2 * 4 * heads * seen
    grows = [mixing_operations(hybrid.config, context) for context in (100, 200, 300)]
    assert grows[2] - grows[1] == grows[1] - grows[0] == 4 * heads * 100
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert rates.bytes_per_second > 1e8 and rates.operations_per_second > 1e8


def test_the_command_prints_ratios_growth_and_where_it_wins(capsys, teacher_folder, tmp_path):
    other = broken_copy(teacher_folder, tmp_path / "other")
    options = ("--lengths", "32,64", "--repeats", 1, "--decode-tokens", 1, "--device", "cpu")
    assert run_command("bench", teacher_folder, other, *options) == 0
    printed = capsys.readouterr().out
    assert "reads faster than random" in printed and "reading grows as tokens^" in printed and "GFLOP/s" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert run_command("bench", teacher_folder, *options, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["machine"]["dtype"] == "float32" and len(figures["models"]) == 1


def test_what_bench_refuses(capsys, tmp_path, teacher_folder):
    assert "at most 512 tokens; 512 are asked for, and 8 are written after them: at most 504 fit" in refused(
        capsys, "bench", teacher_folder, "--lengths", "512"
    )
    assert "must be one of auto" in refused(capsys, "bench", teacher_folder, "--dtype", "int3")
    assert "no folder" in refused(capsys, "bench", tmp_path / "none")


def test_kernels_are_known_by_the_functions_of_their_package(monkeypatch):
    """Under the decorators that Triton wraps them in; on a CPU none runs."""

    def a_kernel():
        """Stands for a Triton function."""

    class Wrapped:
        def __init__(self, fn):
            self.fn = fn

    Wrapped.__module__ = "triton.runtime.autotuner"
    module = types.ModuleType("kernels_of_ours.ops")
    vars(module).update(autotuned=Wrapped(Wrapped(a_kernel)), plain=a_kernel, number=3)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert triton_functions("kernels_of_ours") == {"a_kernel"}
    assert triton_functions("kernels_of") == set()
    found = kernels_of(lambda: torch.ones(3) @ torch.ones(3), torch.device("cpu"), "kernels_of_ours")
    assert found == {"kernels_of_ours": [], "all": []}
