"""Tiny random teachers, and recipes that take a few steps."""

import gc
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import flashmorph.assets as assets
from flashmorph.morphable import Morphable, attach
from flashmorph.move import transplant

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

FEW_STEPS = {
    "budget": "1",
    "baseline": "uniform",
    "style": "lines",
    "tasks": {"one_key": {"task": "many_keys", "num_keys": 1}, "two_hops": {"task": "hops", "num_chains": 2}},
    "calibration_rows": 2,
    "align": {"tokens": 512, "length": 64, "batch_tokens": 128, "learning_rate": 0.001, "checkpoint_steps": 1},
    "select": {
        "settings": {"steps": 12},
        "search": {"length": 96, "batch_tokens": 192, "micro_batch_tokens": 96, "questions": 4},
    },
    "distill": {"tokens": 512, "length": 64, "batch_tokens": 128, "learning_rate": 0.001, "checkpoint_steps": 1},
    "extend": {"tokens": 512, "length": 128, "batch_tokens": 256, "learning_rate": 0.001, "checkpoint_steps": 1},
    "evaluate": {"questions": 4, "length": 128, "perplexity_tokens": 256, "batch_tokens": 512},
}


def random_qwen3(seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, its norm weights log-uniform from 0.01 to 8."""
    torch.manual_seed(seed)
    config = Qwen3Config(**{"vocab_size": 97, **SHAPE, **changes})
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(torch.exp(torch.empty_like(weight).uniform_(math.log(0.01), math.log(8))))
            elif weight.ndim == 1:
                weight.normal_(std=0.3)
            else:
                weight.mul_(3)
    return model


def small_morphable(seed: int = 0, **changes) -> Morphable:
    """A random teacher in its host, with branches started on random tokens."""
    model, _ = transplant(random_qwen3(seed, **changes))
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


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
