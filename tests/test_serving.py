"""What stock llama.cpp makes of our hybrids, from export to greedy tokens. Run with `make test-serving`."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import random_teacher
from llama_tools import compiled, stand_in
from test_cli import refused
from transformers import AutoModelForCausalLM

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.convert.save import save_model
from flashmorph.convert.teacher import locate
from flashmorph.model.morphable import attach, build
from flashmorph.plan import Budget

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no built llama.cpp: make test-serving"),
]
PROMPT, NEW = 200, 40
TOLERANCE = 5e-3  # Of the largest logit; Granite hybrid without its rope is 0.3 off.
WIDE, SQUARE = {"head_dim": 32}, {"hidden_size": 64}
"""Heads that llama.cpp takes in Qwen3.5, and heads that fill the width, as it wants them in Granite hybrid."""


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    return Path(os.environ["LLAMA_CPP"]).resolve()


@pytest.fixture(scope="module")
def converter(llama_cpp, tmp_path_factory) -> Path:
    """llama.cpp with a converter that takes the embedded teacher's tokenizer."""
    return stand_in(llama_cpp, tmp_path_factory.mktemp("converter") / "llama.cpp")


@pytest.fixture(scope="module")
def engine(llama_cpp, tmp_path_factory) -> Path:
    """A program that writes logits, linked to this llama.cpp."""
    return compiled(llama_cpp, Path(__file__).with_name("llama_logits.cpp"), tmp_path_factory.mktemp("engine"))


def served(engine: Path, file: Path, folder: Path, cache: str = "f32") -> torch.Tensor:
    """Logits `[PROMPT + NEW, vocabulary]` of llama.cpp: after the prompt's tokens, then after its own greedy ones."""
    np.asarray(prompt()[0], np.int32).tofile(folder / "tokens")
    subprocess.run([engine, file, folder / "tokens", str(NEW), cache, folder / "logits"], check=True)
    return torch.from_numpy(np.fromfile(folder / "logits", np.float32)).view(PROMPT + NEW, -1)


@torch.no_grad()
def computed(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """The same logits of transformers, in float32, and its greedy tokens `[NEW]`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = model.generate(prompt(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model(input_ids=whole).logits[0], whole[0, PROMPT:].tolist()


def prompt() -> torch.Tensor:
    return torch.randint(len(tiny_tokenizer()), (1, PROMPT), generator=torch.Generator().manual_seed(1))


def random_origin(folder: Path, name: str, **changes) -> Path:
    """A random teacher of six layers on disk, with the embedded teacher's tokenizer.

    Its norm weights are near 1: with those of the other tests, from 0.01 to 8, what two engines round differently grows
    to 3 % of the largest logit already in a Qwen3 in its own class.
    """
    tokenizer = tiny_tokenizer()
    teacher = random_teacher(name, **{"vocab_size": len(tokenizer), "num_hidden_layers": 6, **changes})
    for parameter, weight in teacher.named_parameters():
        if parameter.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hybrid_of(origin: Path, full: list[int], folder: Path) -> Path:
    """A hybrid of the teacher in `origin` as a checkpoint, its linear layers as they start."""
    model, _ = transplant(load_model(origin, torch.float32))
    morphable, _ = attach(model, torch.randint(len(tiny_tokenizer()), (4, 64)))
    budget = Budget("layers", len(full))
    plan = morphable.space(budget).plan([f"layers.{layer}" for layer in full], budget)
    save_model(build(morphable, plan), folder, origin)
    return folder


def difference(engine: Path, converter: Path, folder: Path, place: Path) -> float:
    """Export the checkpoint in `folder`; the same greedy tokens, and how far logits are, as a share of the largest."""
    file = place / "hybrid.gguf"
    assert run_command("export", folder, "--gguf", file, "--llama-cpp", converter, "--dtype", "f32", "--force") == 0
    expected, greedy = computed(folder)
    for cache in ("f16", "f32"):
        found = served(engine, file, place, cache)
        assert found[PROMPT - 1 : -1].argmax(-1).tolist() == greedy
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_the_embedded_teachers_hybrid(engine, converter, tmp_path, capsys):
    folder = hybrid_of(locate("tiny")[0], [2, 5], tmp_path / "hybrid")
    assert difference(engine, converter, folder, tmp_path) < TOLERANCE
    assert "layers 2, 5 of 8 full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3: wide heads", {}),
        ("qwen3_moe: grouped", WIDE),
        ("llama: grouped", SQUARE),
    ],
)
def test_hybrids_of_random_teachers(engine, converter, tmp_path, name, changes):
    folder = hybrid_of(random_origin(tmp_path / "teacher", name, **changes), [0, 3], tmp_path / "hybrid")
    assert difference(engine, converter, folder, tmp_path) < TOLERANCE


def test_a_teacher_in_its_own_class(engine, converter, tmp_path):
    folder = random_origin(tmp_path / "teacher", "qwen3: grouped")
    assert difference(engine, converter, folder, tmp_path) < TOLERANCE


def test_an_unknown_tokenizer_is_refused(llama_cpp, tmp_path, capsys):
    folder = hybrid_of(random_origin(tmp_path / "teacher", "qwen3: wide heads"), [1], tmp_path / "hybrid")
    capsys.readouterr()
    sentence = refused(capsys, "export", folder, "--gguf", tmp_path / "hybrid.gguf", "--llama-cpp", llama_cpp)
    assert "does not know the tokenizer" in sentence
    assert not (tmp_path / "hybrid.gguf").exists()
