"""What stock llama.cpp makes of our hybrids, from `flashmorph export` to greedy tokens. Run with `make test-serving`."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from any_tokenizer import stand_in
from conftest import run_command, tiny_tokenizer
from families import random_teacher
from test_cli import refused
from transformers import AutoModelForCausalLM

from flashmorph.morphable import attach, build
from flashmorph.move import transplant
from flashmorph.plan import Budget
from flashmorph.publish import save_model
from flashmorph.teacher import load_model, locate

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no built llama.cpp: make test-serving"),
]
PROMPT, NEW = 200, 40
SHAPES = {
    "qwen3: grouped": {},
    "qwen3_moe: grouped": {},
    "llama: grouped": {"hidden_size": 64},
}
"""Random teachers besides `tiny`; where Mamba2 is the mixer, heads fill the width."""


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    return Path(os.environ["LLAMA_CPP"]).resolve()


@pytest.fixture(scope="module")
def converter(llama_cpp, tmp_path_factory) -> Path:
    """llama.cpp with a converter that takes the embedded teacher's tokenizer."""
    return stand_in(llama_cpp, tmp_path_factory.mktemp("converter") / "llama.cpp")


@pytest.fixture(scope="module")
def engine(llama_cpp, tmp_path_factory) -> Path:
    """A program that prints logits, linked to this llama.cpp."""
    program, libraries = tmp_path_factory.mktemp("engine") / "llama_logits", llama_cpp / "build" / "bin"
    source = Path(__file__).with_name("llama_logits.cpp")
    include = [f"-I{llama_cpp / folder}" for folder in ("include", "ggml/include")]
    link = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run(["c++", "-std=c++17", *include, source, *link, "-o", program], check=True)
    return program


def served(engine: Path, file: Path, ids: torch.Tensor, folder: Path, cache: str = "f32") -> torch.Tensor:
    """Logits `[PROMPT + NEW, vocabulary]` of llama.cpp: after the prompt's tokens, then after its own greedy ones."""
    np.asarray(ids[0], np.int32).tofile(folder / "tokens")
    subprocess.run([engine, file, folder / "tokens", str(NEW), cache, folder / "logits"], check=True)
    return torch.from_numpy(np.fromfile(folder / "logits", np.float32)).view(PROMPT + NEW, -1)


@torch.no_grad()
def computed(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of transformers, and the greedy tokens `[NEW]`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model(input_ids=whole).logits[0], whole[0, PROMPT:]


def hybrid_of(origin: Path, full: list[int], folder: Path) -> Path:
    """A hybrid of the teacher in `origin`, its linear layers as they start, as a checkpoint."""
    model, _ = transplant(load_model(origin, torch.float32))
    vocabulary = len(tiny_tokenizer())
    morphable, _ = attach(model, torch.randint(vocabulary, (4, 64)))
    budget = Budget("layers", len(full))
    plan = morphable.space(budget).plan([f"layers.{layer}" for layer in full], budget)
    save_model(build(morphable, plan), folder, origin)
    return folder


def random_origin(name: str, folder: Path, **changes) -> Path:
    tokenizer = tiny_tokenizer()
    values = {"vocab_size": len(tokenizer), "num_hidden_layers": 6, **changes}
    random_teacher(name, **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt() -> torch.Tensor:
    return torch.randint(len(tiny_tokenizer()), (1, PROMPT), generator=torch.Generator().manual_seed(1))


def compare(engine: Path, converter: Path, folder: Path, place: Path) -> torch.Tensor:
    """Export the checkpoint in `folder` and hold it against transformers; llama.cpp's logits."""
    file = place / "hybrid.gguf"
    assert run_command("export", folder, "--gguf", file, "--llama-cpp", converter, "--dtype", "f32") == 0
    expected, greedy = computed(folder, prompt())
    found = served(engine, file, prompt(), place)
    assert found[PROMPT - 1 : -1].argmax(-1).tolist() == greedy.tolist()
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    in_float16 = served(engine, file, prompt(), place, cache="f16")
    assert in_float16[PROMPT - 1 : -1].argmax(-1).tolist() == greedy.tolist()
    return found
