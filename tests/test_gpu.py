"""What only a GPU can show. Run with `make test-gpu`; skipped where there is none."""

import json

import pytest
import torch
from conftest import run_command

from flashmorph.environment import describe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def on_both(tmp_path_factory) -> dict[str, dict]:
    """`results.json` of the demo on the CPU and on CUDA."""
    results = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp("demo") / device
        assert run_command("morph", "tiny", "--recipe", "demo", "--output", folder, "--device", device) == 0
        results[device] = json.loads((folder / "results.json").read_text())
    return results


def test_cuda_chooses_the_same_layers(on_both):
    assert on_both["cuda"]["layers"] == on_both["cpu"]["layers"]


def test_cuda_reaches_the_same_recall(on_both):
    low, high = on_both["cpu"]["hybrid"]["recall_interval"]
    assert low <= on_both["cuda"]["hybrid"]["recall"] <= high


def test_the_fast_kernels_are_used_where_they_are_installed():
    pytest.importorskip("fla")
    assert describe()["torch_chunk_gated_delta_rule"].startswith("fla.")
