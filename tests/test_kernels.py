"""Linear mixers run where their tensors are: PyTorch's reference on a CPU, whatever kernel packages are installed."""

import importlib
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import small_morphable
from families import ONE_FOR_EACH_HOST

from flashmorph.cli.environment import describe
from flashmorph.hosts import HOSTS, use_kernels
from flashmorph.mixers import Kernels, Mamba2
from flashmorph.mixers import kernels as kernel_module
from flashmorph.mixers.delta_scan import delta_scan
from flashmorph.mixers.kernels import implementation_in_use
from flashmorph.mixers.mamba2_scan import CHUNK, chunk_scan
from flashmorph.own.states_flashmorph import chunked
from flashmorph.plan import Budget

KERNELS = [mixer.kernels for host in HOSTS for mixer in host.mixers.values() if mixer.kernels]
CASES = [(kernels, name) for kernels in KERNELS for name in kernels.functions]


def arguments(name: str) -> dict[str, torch.Tensor | int]:
    """Small random inputs of a kernel function, its first tensor first."""
    time = 1 if name.endswith("update") else 5 if "recurrent" in name else 70
    if name.startswith("causal_conv1d"):
        state = {"conv_state": torch.randn(2, 6, 4)} if name.endswith("update") else {}
        return {"hidden_states": torch.randn(2, 6, time), **state, "weight": torch.randn(6, 4)}
    if name == "mamba2_selective_state_update":
        groups = {part: torch.randn(2, 3, 8) for part in "BC"}
        state, rates = torch.randn(2, 3, 4, 8), -torch.rand(3, 4, 8)
        return {"state": state, "x": torch.randn(2, 3, 4), "dt": torch.rand(2, 3, 4), "A": rates, **groups}
    if name == "mamba2_split_conv1d_scan_combined":
        return {part: torch.randn(2, 3, 4) for part in ("zxbcdt", "weight", "bias", "dt_bias", "A", "D")} | {"size": 16}
    if name.startswith("mamba2"):
        first = {"x": torch.randn(2, time, 3, 4), "dt": torch.rand(2, time, 3), "A": -torch.rand(3)}
        return {**first, **{part: torch.randn(2, time, 3, 8) for part in "BC"}, "chunk_size": 16}
    heads = {part: torch.randn(2, time, 3, 8) for part in ("query", "key", "value")}
    return {**heads, "g": -torch.rand(2, time, 3), "beta": torch.rand(2, time, 3)}


def call(function, values: dict[str, torch.Tensor | int], **settings):
    return function(
        *(value.clone() if isinstance(value, torch.Tensor) else value for value in values.values()), **settings
    )


def tensors(result) -> list[torch.Tensor]:
    return [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]


@pytest.fixture(autouse=True)
def kernels_by_device():
    for host in HOSTS:
        use_kernels(host.model_type)


def named(kernels: Kernels, name: str):
    return getattr(importlib.import_module(kernels.module), name)


@pytest.mark.parametrize("packed", ["cu_seqlens", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_packed_sequences_on_a_cpu_are_refused(kernels, name, packed):
    function, values = named(kernels, name), arguments(name)
    assert all(torch.isfinite(part).all() for part in tensors(call(function, values, **{packed: None})))
    with pytest.raises(ValueError, match="packed sequences.*cpu"):
        call(function, values, **{packed: torch.tensor([0, 3, 70], dtype=torch.int32)})


@pytest.mark.parametrize("teacher", ONE_FOR_EACH_HOST)
@pytest.mark.parametrize("training", [False, True])
def test_packed_sequences_are_refused_by_a_whole_model(teacher, training):
    morphable = small_morphable(0, teacher)
    budget = Budget("layers", 1)
    model = morphable.instantiate(morphable.space(budget).plan(["layers.0"], budget)).train(training)
    ids = torch.randint(97, (1, 12))
    assert torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()
    for name, packed in (("seq_idx", [[0] * 5 + [1] * 7]), ("cu_seq_lens_q", [0, 5, 12])):
        with pytest.raises(ValueError, match="packed sequences"):
            model(input_ids=ids, use_cache=False, **{name: torch.tensor(packed, dtype=torch.int32)})


@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_results_on_a_cpu_are_those_of_the_reference(kernels, name):
    function, values = named(kernels, name), arguments(name)
    settings = {"activation": "silu"} if name.startswith("causal") else {}
    settings = {"use_qk_l2norm_in_kernel": True} if "delta_rule" in name else settings
    expected = tensors(call(function.__wrapped__, values, **settings))
    found = tensors(call(function, values, **settings))
    # The fused kernel has no reference: it gives None, and the layer goes its own way.
    assert len(found) == len(expected) == (0 if "split_conv1d" in name else len(expected) or 1)
    for one, other in zip(found, expected, strict=True):
        # Our own scan adds in another order than transformers' reference.
        allowed = 1e-5 if name in kernels.lean else 0.0
        torch.testing.assert_close(one, other, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, 3 * CHUNK + 5])
def test_our_scan_and_its_gradients_are_those_of_transformers(time, groups):
    """With heads that share keys and queries, a bias and limits of steps, D, and a state to begin with."""
    values = {
        "hidden_states": torch.randn(2, time, 6, 4),
        "dt": torch.randn(2, time, 6),
        "A": -torch.rand(6),
        "B": torch.randn(2, time, groups, 8),
        "C": torch.randn(2, time, groups, 8),
        "D": torch.randn(6),
        "dt_bias": torch.randn(6),
        "initial_states": torch.randn(2, 6, 4, 8),
    }
    settings = {"chunk_size": 256, "dt_softplus": True, "dt_limit": (0.1, 2.0), "return_final_states": True}
    results = []
    for scan in (chunk_scan, named(Mamba2.kernels, "mamba2_chunk_scan").__wrapped__):
        own = {name: value.clone().requires_grad_() for name, value in values.items()}
        y, state = scan(**own, **settings)
        gradients = torch.autograd.grad(y.square().sum() + state.square().sum(), list(own.values()))
        results.append((y, state, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.detach().abs().max().item())


@pytest.mark.parametrize("settings", [{}, {"use_qk_l2norm_in_kernel": True, "chunk_size": 16}])
@pytest.mark.parametrize("time", [1, 63, 64, 150])
def test_our_delta_rule_and_its_gradients_are_those_of_transformers(time, settings):
    """With keys that several value heads share, and with and without a state to begin with."""
    values = {
        "query": torch.randn(2, time, 2, 8),
        "key": 0.3 * torch.randn(2, time, 2, 8),
        "value": torch.randn(2, time, 6, 5),
        "g": -torch.rand(2, time, 6),
        "beta": torch.rand(2, time, 6),
    }
    reference = named(KERNELS[0], "torch_chunk_gated_delta_rule").__wrapped__
    for start in ({}, {"initial_state": torch.randn(2, 6, 8, 5)}):
        results = []
        for scan in (delta_scan, reference):
            own = {name: value.clone().requires_grad_() for name, value in (values | start).items()}
            y, state = scan(**own, **settings, output_final_state=True)
            gradients = torch.autograd.grad(y.square().sum() + state.square().sum(), list(own.values()))
            results.append((y, state, *gradients))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.detach().abs().max().item()))
    narrow = {name: value.bfloat16() for name, value in values.items()}
    (y, state), (expected, _) = delta_scan(**narrow, **settings), reference(**narrow, **settings)
    assert state is None and y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rule", ["Gated DeltaNet", "by head"])
def test_the_backward_of_the_delta_rule_makes_no_tensor_of_zeros_for_each_chunk(rule):
    """It would take time that grows with the square of the context."""

    def indexed(time: int) -> int:
        """Indices into tensors of the whole length."""
        q, k, v = (torch.randn(1, time, 2, 4, requires_grad=True) for _ in range(3))
        g, beta = torch.rand(2, 1, time, 2, requires_grad=True)
        if rule == "by head":
            y, _ = chunked(*(each.transpose(1, 2) for each in (q, k, v, g)), None, 1, 16, beta.transpose(1, 2))
        else:
            y, _ = delta_scan(q, k, v, -g, beta, chunk_size=16)
        nodes, seen = [y.grad_fn], set()
        while nodes:
            if (node := nodes.pop()) is not None and node not in seen:
                seen.add(node)
                nodes += [each for each, _ in node.next_functions]
        names = ("SliceBackward0", "SelectBackward0")
        sizes = [math.prod(node._saved_self_sym_sizes) for node in seen if node.name() in names]
        return sum(size >= 2 * time for size in sizes)

    assert indexed(64) == indexed(128)


def test_the_recurrence_is_the_gated_delta_rule():
    """Both forms against the formula: decay the state, correct the value stored under the key, read with the query."""
    values = arguments("torch_chunk_gated_delta_rule")
    query, key = (F.normalize(values[name].double(), dim=-1) for name in ("query", "key"))
    value, decay, beta = values["value"].double(), values["g"].double().exp(), values["beta"].double()
    state, outputs = torch.zeros(2, 3, 8, 8, dtype=torch.float64), []
    for time in range(70):
        state = state * decay[:, time, :, None, None]
        stored = torch.einsum("bhkv,bhk->bhv", state, key[:, time])
        change = beta[:, time, :, None] * (value[:, time] - stored)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, time], change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, time]) / 8**0.5)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        settings = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        found, last = call(named(KERNELS[0], name), values, **settings)
        torch.testing.assert_close(found.double(), torch.stack(outputs, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last.double(), state, rtol=1e-4, atol=1e-5)


def test_the_scan_is_mamba2():
    """Both forms against the formula (arXiv 2405.21060, section 6): decay the state, add dt B x, read with C."""
    values = arguments("mamba2_chunk_scan")
    x, dt, rate, keys, queries = (values[name].double() for name in ("x", "dt", "A", "B", "C"))
    state, outputs = torch.zeros(2, 3, 4, 8, dtype=torch.float64), []
    for time in range(70):
        decay = torch.exp(dt[:, time] * rate)[..., None, None]
        state = state * decay + torch.einsum("bh,bhp,bhn->bhpn", dt[:, time], x[:, time], keys[:, time])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, queries[:, time]))
    expected = torch.stack(outputs, 1)
    found, last = call(named(Mamba2.kernels, "mamba2_chunk_scan"), values, return_final_states=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.double(), state, rtol=1e-4, atol=1e-4)
    update, state = named(Mamba2.kernels, "mamba2_selective_state_update"), torch.zeros(2, 3, 4, 8)
    rates = values["A"][:, None, None].expand(3, 4, 8)
    for time in range(70):
        steps = values["dt"][:, time, :, None].expand(2, 3, 4)
        found = update(state, values["x"][:, time], steps, rates, values["B"][:, time], values["C"][:, time])
        torch.testing.assert_close(found.double(), expected[:, time], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_dispatching_twice_changes_nothing(host):
    before = [named(kernels, name) for kernels, name in CASES]
    use_kernels(host.model_type)
    assert [named(kernels, name) for kernels, name in CASES] == before
    assert all(function.__name__ == name for function, (_, name) in zip(before, CASES, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_the_environment_says_what_runs_and_why():
    facts = describe()
    assert facts["device"] != "cuda"
    assert all(facts[name].startswith("PyTorch reference") and "CUDA" in facts[name] for _, name in CASES)
    assert facts["torch"] == version("torch")
    assert facts["flashmorph"]


FAKE_KERNEL = """
def {name}(*args, **kwargs):
    raise RuntimeError("0 active drivers ([]). There should only be one.")
"""

SCRIPT = """
import sys

import torch
import transformers.models.granitemoehybrid.modeling_granitemoehybrid as mamba
import transformers.models.qwen3_5.modeling_qwen3_5 as modelling

sys.path.insert(0, sys.argv[1])
tensor = torch.randn(1, 5, 2, 4)
for call in (
    lambda: modelling.torch_chunk_gated_delta_rule(tensor, tensor, tensor, g=-tensor[..., 0], beta=tensor[..., 0]),
    lambda: modelling.torch_recurrent_gated_delta_rule(tensor, tensor, tensor, g=-tensor[..., 0], beta=tensor[..., 0]),
    lambda: modelling.causal_conv1d_fn(tensor[0], tensor[0, 0]),
    lambda: modelling.causal_conv1d_update(tensor[0], tensor[0], tensor[0, 0]),
    lambda: mamba.mamba2_chunk_scan(tensor, tensor[..., 0], tensor[0, 0, :, 0], tensor, tensor, 16),
    lambda: mamba.mamba2_split_conv1d_scan_combined(tensor),
    lambda: mamba.mamba2_selective_state_update(tensor),
    lambda: mamba.causal_conv1d_fn(tensor[0], tensor[0, 0]),
):
    try:
        call()
    except RuntimeError as error:
        assert "0 active drivers" in str(error), error
    else:
        raise AssertionError("transformers did not pick the fake kernels, so this shows nothing")

from conftest import small_morphable
from families import ONE_FOR_EACH_HOST

from flashmorph.cli.environment import describe
from flashmorph.hosts import HOSTS
from flashmorph.mixers.kernels import implementation_in_use
from flashmorph.mixers.mamba2_scan import CHUNK, chunk_scan
from flashmorph.plan import Budget

for teacher in ONE_FOR_EACH_HOST:
    morphable = small_morphable(0, teacher)
    budget = Budget("layers", 1)
    model = morphable.instantiate(morphable.space(budget).plan(["layers.0"], budget))
    ids = torch.randint(97, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    made = model.eval().generate(ids, **settings)
    assert made.shape == (2, 13), made.shape
facts = describe()
for host in HOSTS:
    for kernels in (mixer.kernels for mixer in host.mixers.values() if mixer.kernels):
        for name in kernels.functions:
            print(name, implementation_in_use(kernels.module, name), facts[name], sep="|")
print("version", facts["flash-linear-attention"], sep="|")
"""


@pytest.fixture
def machine_with_kernels(tmp_path) -> Path:
    """Packages that import like flash-linear-attention, causal-conv1d and mamba-ssm; their kernels cannot run."""
    rules = tmp_path / "fla" / "ops" / "gated_delta_rule"
    rules.mkdir(parents=True)
    names = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    rules.joinpath("__init__.py").write_text("".join(FAKE_KERNEL.format(name=name) for name in names))
    for folder in (tmp_path / "fla", tmp_path / "fla" / "ops"):
        folder.joinpath("__init__.py").touch()
    convolution = tmp_path / "causal_conv1d"
    convolution.mkdir()
    names = ("causal_conv1d_fn", "causal_conv1d_update")
    convolution.joinpath("__init__.py").write_text("".join(FAKE_KERNEL.format(name=name) for name in names))
    scans = tmp_path / "mamba_ssm" / "ops" / "triton"
    scans.mkdir(parents=True)
    for folder in (scans, scans.parent, scans.parent.parent):
        folder.joinpath("__init__.py").touch()
    names = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
    scans.joinpath("ssd_combined.py").write_text("".join(FAKE_KERNEL.format(name=name) for name in names))
    scans.joinpath("selective_state_update.py").write_text(FAKE_KERNEL.format(name="selective_state_update"))
    metadata = tmp_path / "flash_linear_attention-0.6.9.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: flash-linear-attention\nVersion: 0.6.9\n")
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_installed_kernels_that_cannot_run_here_are_not_run(machine_with_kernels):
    paths = os.pathsep.join([str(machine_with_kernels), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert [name for name, _, _ in lines[:-1]] == [name for _, name in CASES]
    for name, module, fact in lines[:-1]:
        packages = {"causal": "causal_conv1d", "mamba2": "mamba_ssm.ops.triton", "torch_": "fla.ops.gated_delta_rule"}
        assert module.startswith(packages[name[:6]])
        assert fact.startswith("PyTorch reference") and "cpu" in fact
    assert lines[-1] == ["version", "0.6.9"]


@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_the_implementation_in_use_is_named(kernels, name):
    module = implementation_in_use(kernels.module, name)
    assert module == "PyTorch reference" or module.split(".")[0] in ("fla", "causal_conv1d", "mamba_ssm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_kernel_that_calls_one_which_is_not_installed_is_not_used(machine_with_kernels):
    """mamba-ssm's scan with its convolution fused calls causal-conv1d, which it does not require."""
    shutil.rmtree(machine_with_kernels / "causal_conv1d")
    paths = os.pathsep.join([str(machine_with_kernels), os.environ.get("PYTHONPATH", "")])
    script = (
        "from flashmorph.hosts import HOSTS, use_kernels\n"
        "from flashmorph.mixers.kernels import implementation_in_use\n"
        "use_kernels('granitemoehybrid')\n"
        "for host in HOSTS:\n"
        "    for mixer in host.mixers.values():\n"
        "        for name in mixer.kernels.functions if mixer.kernels else ():\n"
        "            print(name, implementation_in_use(mixer.kernels.module, name))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert used["mamba2_split_conv1d_scan_combined"] == used["causal_conv1d_fn"] == "PyTorch reference"
    assert used["mamba2_chunk_scan"] == "mamba_ssm.ops.triton.ssd_combined"


HOPPER = {"IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": False}


@pytest.mark.parametrize("changed", [{}, *({name: not value} for name, value in HOPPER.items())], ids=str)
def test_a_kernel_without_gradients_is_not_trained_on(changed, monkeypatch):
    """What flash-linear-attention refuses in the middle of a backward pass is known before."""
    utils = ModuleType("fla.utils")
    vars(utils).update(HOPPER | changed)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.utils", utils)
    monkeypatch.setattr(kernel_module, "implementation_in_use", lambda *names: "fla.ops")
    runs = kernel_module.kernel_runs(named_kernels(), torch.device("cuda"))
    assert runs == bool(changed)


def named_kernels():
    """Those of Gated DeltaNet."""
    kernels = HOSTS[0].mixers["linear"].kernels
    assert kernels
    return kernels
