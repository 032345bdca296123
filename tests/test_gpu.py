"""What only a GPU can show. Run with `make test-gpu`; skipped where there is none."""

import copy
import json

import pytest
import torch
from conftest import run_command
from test_layerwise import assert_same_checkpoint, saved
from test_packing import CASES, hybrid, morphable_model, moved, packed_rows, planted, run_apart

from flashmorph.cli.environment import describe
from flashmorph.convert.streamed import transplant_checkpoint
from flashmorph.data.isolation import cut, marked
from flashmorph.hosts import supports_varlen

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


def test_a_checkpoint_moves_on_cuda_into_the_same_weights(tmp_path):
    source = saved("qwen3: grouped", tmp_path / "teacher")
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        transplant_checkpoint(source, tmp_path / device, device=torch.device(device))
    assert_same_checkpoint(tmp_path / "cuda", tmp_path / "cpu")


def test_the_fast_kernels_are_used_where_they_are_installed():
    pytest.importorskip("fla")
    assert describe()["torch_chunk_gated_delta_rule"].startswith("fla.")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("full", ["layers.0", "layers.1"])
@torch.no_grad()
def test_kernels_keep_documents_apart(full, case):
    """With the boundaries that kernels take: nothing leaks, and the result is that of single documents."""
    device, host = torch.device("cuda"), morphable_model(case).host
    if not supports_varlen(host, device):
        pytest.skip(f"{host.name} takes no boundaries here")
    decoder = copy.deepcopy(hybrid(case, full)).to(device).model
    starts = packed_rows()[1].to(device)
    before, after = (
        run_apart(decoder, host, ids.to(device), starts, way=lambda *rows: [marked(*rows)]) for ids in planted()
    )
    found = moved(before, after)
    assert found[0, 12:75].any()
    assert not found[0, :12].any() and not found[0, 75:].any() and not found[1].any()
    expected = run_apart(decoder, host, packed_rows()[0].to(device), starts, way=cut)
    torch.testing.assert_close(before, expected, rtol=2e-2, atol=2e-2)
