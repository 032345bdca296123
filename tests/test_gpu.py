"""What only a GPU can show. Run with `make test-gpu`; skipped where there is none."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_command
from kernel_names import kernels_of
from test_layerwise import assert_same_checkpoint, saved
from test_packing import CASES, hybrid, morphable_model, moved, packed_rows, planted, run_apart
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from flashmorph.cli.environment import describe
from flashmorph.convert.streamed import transplant_checkpoint
from flashmorph.data.isolation import cut, marked
from flashmorph.hosts import host_for, supports_varlen
from flashmorph.mixers.kernels import kernel_runs
from flashmorph.model.morphable import Morphable
from flashmorph.own import CACHE
from flashmorph.plan import Budget
from flashmorph.stages.align import AlignmentLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
"""Heads as those of real models: of some kernels not every width is tried by anybody."""
TEACHERS = {"Gated DeltaNet": Qwen3Config(**SHAPE), "Mamba2": LlamaConfig(**SHAPE)}
PACKAGES = {"Gated DeltaNet": "fla", "Mamba2": "mamba_ssm"}


def morphable_of(teacher: PreTrainedConfig) -> Morphable:
    """A random host on the CPU, in float32, its branches untrained."""
    torch.manual_seed(0)
    host = host_for(teacher)
    return Morphable(host.model_class(host.config(teacher)))  # type: ignore[arg-type]


def ids_of(rows: int = 2, time: int = 300) -> torch.Tensor:
    """No multiple of a kernel's chunk long."""
    return torch.randint(512, (rows, time), generator=torch.Generator().manual_seed(1))


def passes(morphable: Morphable, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Hidden states with every branch half open, and the gradients of all branches, each flattened."""
    weights = [weight.requires_grad_(True) for each in morphable.branch_parameters() for weight in each]
    gates = torch.full((len(morphable.layers), len(morphable.options)), 0.5, device=morphable.device)
    with torch.autocast(morphable.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = morphable(ids_of().to(morphable.device), gates)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.device)
    gradients = torch.autograd.grad((hidden.float() * direction).sum(), weights)
    return [hidden.float().flatten().cpu(), *(each.float().flatten().cpu() for each in gradients)]


def needs_kernel(name: str) -> None:
    """Skip where the kernels of this mixer are not installed or do not train."""
    kernels = host_for(TEACHERS[name]).mixers["linear"].kernels
    morphable_of(TEACHERS[name])
    if not (kernels and kernel_runs(kernels, torch.device("cuda"))):
        pytest.skip((kernels and kernels.no_gradient()) or f"{PACKAGES[name]} is not installed")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two vectors, as a share of the second's length."""
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", TEACHERS)
def test_a_gpu_computes_what_the_references_compute_on_a_cpu(name):
    """With a kernel where there is one, in tf32."""
    expected = passes(morphable_of(TEACHERS[name]), None)
    found = passes(morphable_of(TEACHERS[name]).cuda(), None)
    distances = list(map(distance, found, expected))
    assert max(distances) < 1e-2, distances


@pytest.mark.parametrize("name", TEACHERS)
def test_in_bfloat16_a_gpu_computes_nearly_that(name):
    """All gradients together: those of a few numbers, such as decays, are mostly rounding."""
    expected = passes(morphable_of(TEACHERS[name]), None)
    found = passes(morphable_of(TEACHERS[name]).cuda(), torch.bfloat16)
    assert distance(found[0], expected[0]) < 5e-2
    assert distance(torch.cat(found[1:]), torch.cat(expected[1:])) < 5e-2


@pytest.mark.parametrize("name", TEACHERS)
def test_alignment_runs_the_kernels(name):
    needs_kernel(name)
    morphable = morphable_of(TEACHERS[name]).cuda()
    for weight in (weight for each in morphable.branch_parameters() for weight in each):
        weight.requires_grad_(True)
    loss = AlignmentLoss(morphable)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss(ids_of().cuda())["loss"].backward()

    names = kernels_of(step, torch.device("cuda"), PACKAGES[name])[PACKAGES[name]]
    print(f"{name}: {', '.join(names)}")
    assert names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_with_a_cache_a_hybrid_writes_what_it_would_without(name, dtype):
    morphable = morphable_of(TEACHERS[name])
    budget = Budget("layers", 1)
    model = morphable.instantiate(morphable.space(budget).plan(["layers.1"], budget)).to("cuda", dtype).eval()
    ids = ids_of().cuda()
    whole = model(input_ids=ids).logits.float()
    read = model(input_ids=ids[:, :-8], use_cache=True)
    steps = [read.logits[:, -1:]]
    for place in range(ids.shape[1] - 8, ids.shape[1]):
        steps.append(model(input_ids=ids[:, place : place + 1], use_cache=True, **{CACHE: read[CACHE]}).logits)
    found = torch.cat(steps, 1).float()
    assert distance(found, whole[:, -9:]) < (1e-2 if dtype == torch.float32 else 5e-2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict:
    """`results.json` of the demo on CUDA; kept in the folder that FLASHMORPH_GPU_RESULTS names."""
    folder = tmp_path_factory.mktemp("demo")
    assert run_command("morph", "tiny", "--recipe", "demo", "--output", folder, "--device", "cuda") == 0
    if kept := os.environ.get("FLASHMORPH_GPU_RESULTS"):
        shutil.copy(folder / "results.json", Path(kept) / "demo_cuda.json")
    return json.loads((folder / "results.json").read_text())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_the_second_gpu_leaves_the_first_alone(tmp_path, teacher_folder, recipe_file):
    first = torch.cuda.current_device()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    options = ("--recipe", recipe_file, "--output", tmp_path / "run", "--device", "cuda:1")
    try:
        assert run_command("morph", teacher_folder, *options) == 0
    finally:
        torch.cuda.set_device(first)
    assert torch.cuda.max_memory_allocated(0) == before and torch.cuda.max_memory_allocated(1) > 0


def test_demo_chooses_the_layers_that_a_cpu_chooses(demo):
    assert demo["layers"] == json.loads((COMMITTED / "demo.json").read_text())["layers"]


def test_demo_reaches_the_recall_that_a_cpu_reaches(demo):
    low, high = json.loads((COMMITTED / "demo.json").read_text())["hybrid"]["recall_interval"]
    assert low <= demo["hybrid"]["recall"] <= high


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
