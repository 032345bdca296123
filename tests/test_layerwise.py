"""A checkpoint moves into its host layer by layer with the same result as a model in memory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from families import TEACHERS, random_teacher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flashmorph.convert.shards as shards
from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.save import complete, save_model
from flashmorph.convert.streamed import transplant_checkpoint
from flashmorph.errors import UserError
from flashmorph.hosts.qwen3_5 import Qwen35Host

SHARD = "8KB"
"""Small enough that every layer of a tiny teacher lies in several files."""


def saved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = SHARD, **changes) -> Path:
    """A random teacher on disk, in many files."""
    random_teacher(name, 3, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def moved(source: Path, target: Path, **settings):
    """What a move layer by layer leaves behind, and its proofs."""
    target.mkdir()
    config, found = transplant_checkpoint(source, target, settings)
    complete(target, config, source)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Weights to the last bit, names, and all other files but the index."""
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
    for path in other.iterdir():
        if not path.name.startswith("model"):
            assert (one / path.name).read_text() == path.read_text(), path.name


@pytest.mark.parametrize("name", TEACHERS)
def test_the_result_and_the_proof_are_those_of_a_move_in_memory(name, tmp_path):
    source = saved(name, tmp_path / "teacher")
    found = moved(source, tmp_path / "layerwise")
    model, proof = transplant(load_model(source, torch.float32))
    save_model(model, tmp_path / "whole", source)
    assert_same_checkpoint(tmp_path / "layerwise", tmp_path / "whole")
    assert found.proof == proof
    assert list(found.parts) == ["the embedding", "layer 0", "layer 1", "the head"]
    assert all(part.difference <= part.tolerance for part in found.parts.values())
    if not name.startswith("qwen3"):  # Weights that are copied are rounded as the teacher's are.
        assert found.rounding == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name, settings", [("granite", {"mamba_expand": 1}), ("qwen2", {"window": 16}),
                                            ("smollm3", {"window": 16}), ("mistral", {"window": 16})])  # fmt: skip
def test_settings_of_the_host_are_kept(name, settings, tmp_path):
    source = saved(f"{name}: grouped", tmp_path / "teacher")
    moved(source, tmp_path / "layerwise", **settings)
    model, _ = transplant(load_model(source, torch.float32), settings)
    save_model(model, tmp_path / "whole", source)
    assert_same_checkpoint(tmp_path / "layerwise", tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qwen3: grouped", "phi3: grouped", "qwen3_moe: grouped"])
def test_the_dtype_of_the_checkpoint_is_kept(name, dtype, tmp_path):
    source = saved(name, tmp_path / "teacher", dtype)
    found = moved(source, tmp_path / "layerwise")
    assert {weight.dtype for weight in weights(tmp_path / "layerwise").values()} == {dtype}
    assert (found.rounding is None) == (dtype == torch.float32)
    model, _ = transplant(load_model(source, torch.float32))
    save_model(model, tmp_path / "whole", source)
    assert_same_checkpoint(tmp_path / "layerwise", tmp_path / "whole")


def test_files_are_as_large_as_the_teachers_and_the_index_names_every_weight(tmp_path):
    source = saved("qwen3: grouped", tmp_path / "teacher")
    moved(source, tmp_path / "host")
    index = json.loads((tmp_path / "host" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "host").glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    for file in files:
        names = load_file(file)
        assert len(names) == 1 or sum(weight.nbytes for weight in names.values()) <= largest
        assert {index["weight_map"][name] for name in names} == {file.name}
    assert index["weight_map"].keys() == weights(tmp_path / "host").keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights(tmp_path / "host").values())
    single = saved("qwen3: grouped", tmp_path / "single", shard="1GB")
    moved(single, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


def test_weights_beyond_the_model_and_those_it_ties_are_not_moved(tmp_path):
    """Checkpoints hold more than their configuration asks for: heads that predict several tokens, old buffers."""
    source = saved("llama: grouped", tmp_path / "teacher", shard="1GB")
    state = load_file(source / "model.safetensors")
    more = {
        "model.layers.2.mlp.up_proj.weight": torch.zeros(3),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(3),
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
    }
    shards.save_file({**state, **more}, source / "model.safetensors", {"format": "pt"})
    moved(source, tmp_path / "layerwise")
    model, _ = transplant(load_model(source, torch.float32))
    save_model(model, tmp_path / "whole", source)
    assert_same_checkpoint(tmp_path / "layerwise", tmp_path / "whole")


def test_a_head_that_is_tied_by_name_only_is_refused(tmp_path):
    source = saved("llama: grouped", tmp_path / "teacher", shard="1GB")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = -state["model.embed_tokens.weight"]
    shards.save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="has a head of its own"):
        moved(source, tmp_path / "host")


@pytest.mark.parametrize("spoiled", ["model.layers.1.self_attn.o_proj.weight", "model.norm.weight"])
def test_a_part_that_is_not_exact_is_named(monkeypatch, tmp_path, spoiled):
    exact = Qwen35Host.state

    def spoil(self, teacher, state):
        state = exact(self, teacher, state)
        return {name: weight * (1.01 if name == spoiled else 1) for name, weight in state.items()}

    monkeypatch.setattr(Qwen35Host, "state", spoil)
    part = "layer 1" if "layers" in spoiled else "the head"
    source = saved("qwen3: grouped", tmp_path / "teacher")
    with pytest.raises(UserError, match=f"not exact: the outputs of {part} differ by"):
        moved(source, tmp_path / "host")


@pytest.mark.parametrize("name", ["qwen3: grouped", "qwen3_moe: grouped"])
def test_the_rounding_of_a_run_is_that_of_the_saved_checkpoint(name, tmp_path):
    source = saved(name, tmp_path / "teacher")
    found = moved(source, tmp_path / "host")
    exact = load_model(source, torch.float32)
    ids = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def divergence(folder: Path) -> float:
        wanted = exact(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        given = rounded(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum(-1).mean().item()

    assert found.rounding == pytest.approx(divergence(tmp_path / "host") / divergence(source), rel=1e-2)


def cut_short(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[3]
    path.write_bytes(path.read_bytes()[:-100])
    return "are they complete"


def file_missing(folder: Path) -> str:
    path = sorted(folder.glob("*.safetensors"))[3]
    path.unlink()
    return path.name


def weight_missing(folder: Path) -> str:
    name = "model.layers.1.mlp.up_proj.weight"
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    shards.save_file({key: weight for key, weight in load_file(path).items() if key != name}, path, {"format": "pt"})
    return f"lacks 1 weights, {name}"


def another_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    return "has shape"


def not_finite(folder: Path) -> str:
    name = "model.layers.1.mlp.up_proj.weight"
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    state = load_file(path)
    state[name][0, 0] = math.nan
    shards.save_file(state, path, {"format": "pt"})
    return f"{name} has values that are not finite"


@pytest.mark.parametrize("spoil", [cut_short, file_missing, weight_missing, another_shape, not_finite])
def test_a_damaged_checkpoint_is_refused_in_one_sentence_and_leaves_nothing(tmp_path, capsys, spoil):
    source = saved("qwen3: grouped", tmp_path / "teacher")
    says = spoil(source)
    assert run_command("transplant", source, "--output", tmp_path / "out" / "host") == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert says in printed and (str(source) in printed or "weight" in says)
    assert not list((tmp_path / "out").glob("*"))


MEMORY = """
import sys
from pathlib import Path

import torch

from flashmorph.bench.memory import peak_bytes
from flashmorph.convert.streamed import transplant_checkpoint

small, source, target = map(Path, sys.argv[1:4])
torch.set_num_threads(1)


def layerwise(source, target):
    target.mkdir()
    transplant_checkpoint(source, target)


layerwise(small, target / "small")  # what is loaded and kept once
print(peak_bytes(lambda: layerwise(source, target / "host"), torch.device("cpu")))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_two_files_and_one_layer(tmp_path):
    """Less than the checkpoint itself; the threshold keeps freed memory from staying with the process."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8}
    teacher = random_teacher("qwen3: grouped", 0, **shape, head_dim=64)
    layer = sum(weight.numel() for weight in teacher.model.layers[0].parameters())
    teacher.to(torch.bfloat16).save_pretrained(tmp_path / "teacher", max_shard_size="5MB")
    files = [path.stat().st_size for path in (tmp_path / "teacher").glob("*.safetensors")]
    assert len(files) >= 10
    saved("qwen3: grouped", tmp_path / "small")
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "teacher", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * max(files) + (4 + 8) * layer < sum(files)
