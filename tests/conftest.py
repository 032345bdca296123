"""Tiny random models, and recipes that take a few steps."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from families import SHAPE, random_teacher
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import flashmorph.assets as assets
from flashmorph.convert.in_memory import transplant
from flashmorph.model.morphable import Morphable, attach

FEW_STEPS = {
    "budget": "1",
    "baseline": "uniform",
    "style": "lines",
    "tasks": {"one_key": {"task": "many_keys", "num_keys": 1}, "two_hops": {"task": "hops", "num_chains": 2}},
    "data": {"source": "demo"},
    "calibration_rows": 2,
    "align": {"tokens": 512, "length": 64, "batch_tokens": 128, "learning_rate": 0.001, "checkpoint_steps": 1},
    "select": {
        "settings": {"steps": 12},
        "require_signal": False,
        "search": {"length": 96, "batch_tokens": 192, "micro_batch_tokens": 96, "questions": 4},
    },
    "distill": {"tokens": 512, "length": 64, "batch_tokens": 128, "learning_rate": 0.001, "checkpoint_steps": 1},
    "extend": {"tokens": 512, "length": 128, "batch_tokens": 256, "learning_rate": 0.001, "checkpoint_steps": 1},
    "evaluate": {"questions": 4, "length": 128, "perplexity_tokens": 256, "batch_tokens": 512},
}


def random_qwen3(seed: int = 0, **changes) -> PreTrainedModel:
    """The teacher of tests that are about something else."""
    return random_teacher("qwen3: grouped", seed, **changes)


def small_morphable(seed: int = 0, teacher: str = "qwen3: grouped", **changes) -> Morphable:
    """A random teacher in its host, with branches started on random tokens."""
    model, _ = transplant(random_teacher(teacher, seed, **changes))
    tokens = torch.randint(model.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(seed))
    return attach(model, tokens)[0]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded teacher's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(Path(assets.__path__[0]) / "tiny")


def run_command(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    from flashmorph.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["flashmorph", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            gc.collect()  # A run holds the lock of its folder until it is gone.
    return 0


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    """The recipe of a few steps, as a file."""
    path = tmp_path_factory.mktemp("recipes") / "few_steps.yaml"
    path.write_text(yaml.safe_dump(FEW_STEPS))
    return path


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A random two-layer Qwen3 on disk, in bfloat16, with the embedded teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("teachers") / "random"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer) + 7, eos_token_id=tokenizer.eos_token_id, **SHAPE)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own for checkpoints out of GGUF files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
