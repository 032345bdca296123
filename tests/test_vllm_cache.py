"""What vLLM allocates for a hybrid: groups of layers, pages, and what `estimate` prints of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import run_command
from families import config_of

from flashmorph.hosts import configure
from flashmorph.hosts.vllm_cache import Groups, group_layers, nearby, pages_of_states, unpadded, vllm_cache
from flashmorph.mixers import LINEAR, SLIDING
from flashmorph.plan import FULL


@pytest.mark.parametrize(
    ("full", "switched", "groups"),
    [
        (7, 21, Groups(7, 1, 3, 0)),
        (9, 27, Groups(9, 1, 3, 0)),
        (8, 20, Groups(8, 1, 3, 4)),
        (20, 30, Groups(20, 1, 2, 10)),
        (2, 3, Groups(2, 1, 2, 1)),
        (10, 20, Groups(10, 1, 2, 0)),
        # Nearly as many of both kinds: the larger number is the size.
        (13, 12, Groups(13, 1, 1, 1)),
        (8, 9, Groups(9, 1, 1, 1)),
        (20, 8, Groups(8, 3, 1, 4)),
        (28, 0, Groups(28, 1, 0, 0)),
        (0, 28, Groups(28, 0, 1, 0)),
    ],
)
def test_layers_are_grouped_as_vllm_groups_them(full, switched, groups):
    """(20, 30), (2, 3), (10, 20), (13, 12) and (8, 9) are examples in vLLM's own comments."""
    assert group_layers(full, switched) == groups


@pytest.mark.vllm
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python with vLLM: make test-vllm")
def test_vllm_itself_groups_them_so():
    pairs = [(full, layers - full) for layers in (8, 28, 30, 36, 64) for full in range(1, layers)]
    command = [os.environ["VLLM_PYTHON"], Path(__file__).with_name("vllm_groups.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).with_name("vllm_site"))}
    done = subprocess.run(command, input=json.dumps(pairs), env=environment, capture_output=True, text=True, check=True)
    ours = [group_layers(*pair) for pair in pairs]
    assert json.loads(done.stdout.splitlines()[-1]) == [[each.size, each.full, each.switched] for each in ours]


@pytest.mark.parametrize("full", range(1, 40))
def test_every_layer_is_in_a_group_and_the_rest_is_padding(full):
    for switched in range(1, 40):
        found = group_layers(full, switched)
        assert found.size * (found.full + found.switched) == full + switched + found.padded
        assert 0 <= found.padded < 2 * found.size


def test_counts_that_are_no_model():
    for counts in ((0, 0), (-1, 4)):
        with pytest.raises(ValueError, match="no layers"):
            group_layers(*counts)


def test_budgets_without_padding():
    assert unpadded(28) == [1, 2, 4, 7, 14, 21, 24, 26, 27]
    assert {7, 14} <= set(unpadded(28)) and 9 in unpadded(36)
    assert nearby(28, 8) == [7, 14] and nearby(28, 7) == [4, 14]
    assert nearby(28, 1) == [2] and nearby(28, 27) == [26]


def test_a_page_holds_a_state_and_as_few_tokens_as_that_takes():
    pages = pages_of_states(token_bytes=100, state_bytes=1601)
    assert (pages.block_tokens, pages.page_bytes) == (32, 3200)
    assert pages_of_states(100, 1600).block_tokens == 16
    assert pages_of_states(100, 1601, block_tokens=128).block_tokens == 128


def cache_of(teacher: str, full: int, settings=None, **changes):
    host, config = configure(config_of(teacher, num_hidden_layers=8, **changes), settings)
    switched = SLIDING if settings and "window" in settings else LINEAR
    options = [FULL] * full + [switched] * (8 - full)
    config = host.with_plan(config, options)
    return config, vllm_cache(host, config, options)


def test_a_sequence_takes_whole_pages_of_all_groups():
    config, cache = cache_of("qwen3: wide heads", 3)
    assert cache and cache.groups == Groups(3, 1, 2, 1)
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    pages = cache.pages
    assert pages.page_bytes == pages.block_tokens * token and pages.block_tokens % 16 == 0
    # One full group of as many pages as the context fills, two groups of two states each.
    filled = -(-1000 // pages.block_tokens)
    assert cache.sequence_bytes(1000) == 3 * pages.page_bytes * (filled + 2 * 2)


def test_windows_take_the_pages_that_they_touch():
    config, cache = cache_of("qwen3: grouped", 4, {"window": 20})
    assert cache and (cache.groups.size, cache.groups.padded) == (4, 0)
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    assert cache.sequence_bytes(160) == 4 * 16 * token * (10 + 3)
    assert cache.sequence_bytes(16) == 4 * 16 * token * (1 + 2)


def test_the_state_is_in_the_dtype_that_the_checkpoint_names():
    config, _ = cache_of("qwen3: wide heads", 4)
    host, _ = configure(config_of("qwen3: wide heads", num_hidden_layers=8))
    options = [FULL] * 4 + [LINEAR] * 4
    config.dtype = torch.bfloat16
    large = vllm_cache(host, config, options)  # Our checkpoints name float32.
    config.mamba_ssm_dtype = "bfloat16"
    small = vllm_cache(host, config, options)
    assert small and large and small.pages.page_bytes < large.pages.page_bytes


def test_none_where_vllm_does_not_serve():
    # heads x head_dim is not the hidden size: vLLM computes something else.
    assert cache_of("llama: grouped", 2)[1] is None
    assert cache_of("llama: grouped", 2, head_dim=8)[1] is not None
    host, config = configure(config_of("llama: grouped"), {"mixers": "full,window", "window": 16})
    options = [FULL] * (config.num_hidden_layers * config.num_key_value_heads)
    assert vllm_cache(host, config, options) is None


def test_estimate_has_it_beside_our_arithmetic(tmp_path, capsys):
    config_of("qwen3: wide heads", num_hidden_layers=28).save_pretrained(tmp_path)
    command = ("estimate", tmp_path, "--budget", "8", "--contexts", "256", "--set", "evaluate.length=256")
    assert run_command(*command) == 0
    printed = capsys.readouterr().out
    assert "in vLLM" in printed
    assert "8 full and 20 other layers in groups of 8: 4 of 32 layers are padding; none with 7 or 14 full" in printed
    assert run_command(*command, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["vllm_padded_layers"] == 4 and 7 in values["vllm_unpadded_full_layers"]
    assert values["models"]["hybrid"]["vllm_cache_bytes"]["256"] > 0
