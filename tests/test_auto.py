"""`auto`: as much at once as a device's memory holds, decided once."""

import ctypes
import json
import os
import sys

import psutil
import pytest
import torch
from conftest import run_command
from families import config_of

from flashmorph.devices import (
    _cgroup_cores,
    _cgroup_limits,
    every_core,
    limit_threads,
    release_memory,
    total_memory,
    usable_memory,
)
from flashmorph.estimate.auto import Capacity, asked, choose, must_shard, resolved, too_large
from flashmorph.estimate.memory import stage_memory
from flashmorph.estimate.sizes import count_sizes
from flashmorph.estimate.work import model_of
from flashmorph.recipe.recipe import load_recipe, with_settings

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8,
         "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 32768}  # fmt: skip
TRAINED = {"align": "align", "distill": "distill", "extend": "extend", "select": "select.search"}
RECIPE = load_recipe("default")


@pytest.fixture(scope="module", params=["qwen3: grouped", "llama: grouped", "qwen3: grouped on a CPU"])
def shape(request):
    family, _, device = request.param.partition(" on a ")
    config = config_of(family, **SHAPE)
    model = model_of(config, RECIPE)
    return model, count_sizes(model.host, config, model.config, torch.device("cpu") if device else None)


def section(recipe, stage):
    return recipe.select.search if stage == "select" else getattr(recipe, stage)


@pytest.mark.parametrize("stage", [*TRAINED, "evaluate"])
@pytest.mark.parametrize("processes, shard", [(1, False), (8, False), (8, True)])
def test_what_it_chooses_fits_and_more_memory_gives_no_less(shape, stage, processes, shard):
    before, fitted = 0, 0
    for gibibytes in (2, 4, 8, 24, 80, 800):
        capacity = Capacity(gibibytes * 2**30, processes, shard)
        found = choose(stage, RECIPE, *shape, capacity)
        recipe = with_settings(RECIPE, found.values)
        memory = stage_memory(*shape, recipe, processes, True)[stage]
        if not found.too_large:
            fitted += 1
            assert memory.bytes(capacity.sharing) <= capacity.bytes
        assert memory.tokens >= memory.length and memory.tokens % memory.length == 0
        again = getattr(section(recipe, stage), "activation_checkpointing", False)
        assert again in (True, False)
        if not again:
            assert memory.tokens >= before
            before = memory.tokens
    assert fitted >= 3


def test_layers_run_again_where_little_would_fit_otherwise_and_only_there(shape):
    small, large = (choose("extend", RECIPE, *shape, Capacity(gigabytes * 1e9)).values for gigabytes in (4, 400))
    assert small["extend.activation_checkpointing"] is True and large["extend.activation_checkpointing"] is False
    assert small["extend.micro_batch_tokens"] < large["extend.micro_batch_tokens"]


def test_a_cpu_evaluates_no_more_at_once_than_makes_it_faster(shape):
    for length, expected in ((1_024, 8_192), (16_384, 16_384)):
        recipe = with_settings(RECIPE, {"evaluate.length": length})
        on_gpu, on_cpu = (
            choose("evaluate", recipe, *shape, Capacity(200e9, kind=kind)).values for kind in ("cuda", "cpu")
        )
        assert on_cpu == {"evaluate.batch_tokens": expected} and on_gpu["evaluate.batch_tokens"] > 100_000


def test_a_cpu_is_busy_with_fewer_tokens_than_a_gpu(shape, monkeypatch):
    """So between two sizes of memory layers run again on a GPU only; there chunks of logits are larger too."""
    monkeypatch.setattr("flashmorph.losses._GPU_TIMES", 1)
    differing = 0
    for tenths in range(10, 120, 5):
        on_gpu, on_cpu = (
            choose("distill", RECIPE, *shape, Capacity(tenths * 1e8, kind=kind)).values for kind in ("cuda", "cpu")
        )
        again = "distill.activation_checkpointing"
        if on_gpu != on_cpu:
            differing += 1
            assert on_gpu[again] is True and on_cpu[again] is False
            assert 1_024 <= on_cpu["distill.micro_batch_tokens"] < 4_096
    assert differing


def test_what_is_too_large_is_known_beforehand_and_must_be_shared(shape):
    tiny, ample = Capacity(1e6), Capacity(1e12)
    large = too_large(RECIPE, *shape, tiny)
    assert list(large) == ["align", "select", "distill", "extend"] and not too_large(RECIPE, *shape, ample)
    assert list(too_large(RECIPE, *shape, tiny, ["extend", "evaluate"])) == ["extend"]
    for stage, needed in large.items():
        enough, less = Capacity(1.001 * needed), Capacity(0.999 * needed)
        assert stage not in too_large(RECIPE, *shape, enough) and stage in too_large(RECIPE, *shape, less)
        # As much as the smallest thing that `auto` would choose.
        assert not choose(stage, RECIPE, *shape, enough).too_large
    several = Capacity(0.99 * max(large.values()), processes=8)
    assert must_shard(RECIPE, *shape, several) and not too_large(RECIPE, *shape, several._replace(shard=True))


def test_what_is_too_large_is_said_before_any_work(teacher_folder, recipe_file, tmp_path, monkeypatch, capsys):
    for place in ("flashmorph.run.run", "flashmorph.devices"):
        monkeypatch.setattr(f"{place}.usable_memory", lambda device, processes=1: 1e6)
    options = (teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "out")
    assert run_command("morph", *options, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "do not fit into the 976.6 KiB that this device can give" in printed
    assert all(f"{stage} (" in printed for stage in ("align", "select", "distill", "extend"))
    assert ") and extend (" in printed and printed.count(") and ") == 1
    assert printed.rstrip().endswith("share the weights among several GPUs (torchrun) or take a smaller teacher")
    assert run_command("build", *options, "--layers", "0") == 0
    first, *_ = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("recipe")]
    assert first.startswith("align (") and "does not fit" in first and "distill" not in first


def test_a_smaller_device_chooses_anew_and_a_larger_one_goes_on(shape, tmp_path):
    def numbers(gigabytes: float) -> int:
        recipe, _ = resolved("distill", RECIPE, tmp_path, *shape, Capacity(gigabytes * 1e9))
        return recipe.distill.micro_batch_tokens

    at_first = numbers(40)
    assert numbers(400) == at_first and numbers(39) == at_first
    assert numbers(10) < at_first and numbers(40) == numbers(10)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="what glibc does")
def test_what_earlier_work_held_is_given_back():
    """One small tensor that lives keeps glibc from giving back all that lay before it."""
    release_memory(torch.device("cpu"))
    before = psutil.Process().memory_info().rss
    many = [torch.ones(1 << 14) for _ in range(4_000)]
    last = many[-1]
    held = psutil.Process().memory_info().rss - before
    del many
    release_memory(torch.device("cpu"))
    assert held > 200e6 and psutil.Process().memory_info().rss - before < 0.2 * held and last.sum() == 1 << 14


def test_work_that_other_ranks_wait_for_uses_every_core(monkeypatch):
    """torchrun starts every process with one thread."""
    before = torch.get_num_threads()
    monkeypatch.setattr("flashmorph.devices._own_cores", lambda: 2)
    monkeypatch.setattr("flashmorph.devices._cgroup_cores", lambda *_: 3)
    try:
        torch.set_num_threads(1)
        with every_core():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_not_even_one_row_is_told_and_gone_on_with(shape):
    found = choose("distill", RECIPE, *shape, Capacity(1e6))
    assert found.too_large == ["distill"]
    assert found.values == {"distill.activation_checkpointing": True, "distill.micro_batch_tokens": 512}


def test_a_number_always_wins(shape):
    recipe = load_recipe("default", {"distill.micro_batch_tokens": 512, "extend.activation_checkpointing": False})
    assert asked(recipe, "distill") == ["distill.activation_checkpointing"]
    assert asked(recipe, "extend") == ["extend.micro_batch_tokens"]
    assert choose("extend", recipe, *shape, Capacity(80e9)).values.keys() == {"extend.micro_batch_tokens"}
    numbers = load_recipe("default", {"align.micro_batch_tokens": None, "align.activation_checkpointing": True})
    assert not asked(numbers, "align") and not choose("align", numbers, *shape, Capacity(80e9)).values


@pytest.mark.parametrize("rows, processes", [(7, 1), (10, 1), (12, 3), (12, 4), (9, 3)])
def test_a_step_that_comes_out_uneven_takes_the_most_rows_that_divide_it(shape, rows, processes):
    steps = {"align.batch_tokens": rows * 512, "distill.batch_tokens": rows * 512, "extend.batch_tokens": rows * 16384}
    recipe = load_recipe("default", {**steps, "distill.activation_checkpointing": True})
    for gigabytes in (1.6, 1.8, 2, 2.4, 3, 80):
        capacity = Capacity(gigabytes * 1e9, processes)
        values = choose("distill", recipe, *shape, capacity).values
        most = values["distill.micro_batch_tokens"] // 512
        division = with_settings(recipe, values).distill.division(processes)
        assert division.rows <= most and division.rows * division.accumulation * processes == rows
        if processes == 1:
            assert division.rows == max(each for each in range(1, most + 1) if rows % each == 0)


def test_it_is_decided_once_and_kept_with_the_stage(shape, tmp_path):
    first, _ = resolved("extend", RECIPE, tmp_path, *shape, Capacity(8e9))
    later, _ = resolved("extend", RECIPE, tmp_path, *shape, Capacity(800e9, 4))
    assert first == later and isinstance(later.extend.micro_batch_tokens, int)
    number = load_recipe("default", {"extend.micro_batch_tokens": 32768})
    assert resolved("extend", number, tmp_path, *shape, Capacity(8e9))[0].extend.micro_batch_tokens == 32768


def test_a_run_keeps_its_choice_in_the_record_and_goes_on_with_it(teacher_folder, recipe_file, tmp_path, monkeypatch):
    command = ("align", teacher_folder, "--recipe", recipe_file, "--output", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("flashmorph.run.run.usable_memory", lambda *_: 1.0)
        patch.setattr("flashmorph.pipeline.branches.align", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_command(*command) == 130
    assert run_command(*command) == 0
    (record,) = tmp_path.glob("stages/align-*/stage.json")
    assert json.loads(record.read_text())["auto"] == {
        "align.micro_batch_tokens": 64,
        "align.activation_checkpointing": True,
    }
    assert run_command(*command, "--set", "align.micro_batch_tokens=128") == 0
    assert len(list(tmp_path.glob("stages/align-*"))) == 1


def test_plan_says_what_it_would_choose_on_a_gpu(teacher_folder, capsys):
    options = ("estimate", teacher_folder, "--recipe", "default", "--gpu", "l4")
    assert run_command(*options, "--json") == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["distill"]["auto"].keys() == {"distill.micro_batch_tokens", "distill.activation_checkpointing"}
    assert stages["select"]["auto"] and stages["evaluate"]["auto"] and not stages["build"]["auto"]
    assert run_command(*options) == 0
    assert "distill.micro_batch_tokens" in " ".join(capsys.readouterr().out.split())


def test_a_cpu_has_what_its_control_group_may_take(tmp_path, monkeypatch):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "a" / "b").mkdir(parents=True)
    (root / "memory" / "c").mkdir(parents=True)
    (root / "a" / "memory.max").write_text("4096\n")
    (root / "a" / "b" / "memory.max").write_text("max\n")
    (root / "memory" / "c" / "memory.limit_in_bytes").write_text("1024\n")
    own.write_text("0::/a/b\n")
    assert list(_cgroup_limits(root, own)) == [4096]
    own.write_text("5:cpu:/c\n4:memory:/c\n")
    assert list(_cgroup_limits(root, own)) == [1024]
    own.write_text("0::/of/the/host\n")
    assert not list(_cgroup_limits(root, own)) and not list(_cgroup_limits(root, tmp_path / "none"))
    monkeypatch.setattr("flashmorph.devices._cgroup_limits", lambda *_: [10_000])
    assert total_memory(torch.device("cpu")) == 10_000
    assert usable_memory(torch.device("cpu"), 4) == usable_memory(torch.device("cpu")) / 4 < 10_000 / 4


def test_threads_are_no_more_than_the_cores_of_the_control_group(tmp_path, monkeypatch):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "a").mkdir(parents=True)
    own.write_text("0::/a\n")
    (root / "a" / "cpu.max").write_text("max 100000\n")
    assert _cgroup_cores(root, own) == (os.cpu_count() or 1)
    (root / "a" / "cpu.max").write_text("50000 100000\n")
    assert _cgroup_cores(root, own) == 1
    before = torch.get_num_threads()
    monkeypatch.setattr("flashmorph.devices._cgroup_cores", lambda *_: 1)
    try:
        limit_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.setattr("flashmorph.devices._cgroup_cores", lambda *_: 99)
        limit_threads()
        assert torch.get_num_threads() == 1, "fewer threads stay fewer"
    finally:
        torch.set_num_threads(before)


def test_weights_are_sharded_only_where_a_stage_could_not_run_otherwise(shape):
    large, small = Capacity(80 * 2**30, 8), Capacity(2**28, 8)
    assert must_shard(RECIPE, *shape, small) and not must_shard(RECIPE, *shape, large)
    assert not must_shard(RECIPE, *shape, small._replace(processes=1))
    assert must_shard(load_recipe("default", {"shard": True}), *shape, large)
    assert not must_shard(load_recipe("default", {"shard": False}), *shape, small)
