"""The sound checkpoints that cases are made from: two layers, 32 or 64 wide, made once in a process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from conftest import tiny_tokenizer
from families import random_teacher

SOUND = {
    "qwen3": ("qwen3: grouped", {}),
    "llama": ("llama: bias, untied, llama3", {}),
    "phi3": ("phi3: grouped", {}),
    "qwen3_moe": ("qwen3_moe: grouped", {}),
}
"""Families by a name that is short; the shapes are those of `families.py`."""


def copy_of(name: str, folder: Path, parts: str = "1GB") -> Path:
    """A copy of a sound teacher as the new folder `folder`, its weights in files of at most `parts`."""
    return Path(shutil.copytree(_sound(name, parts), folder))


@cache
def _sound(name: str, parts: str) -> Path:
    folder = _place() / f"{name}-{parts}"
    shape, changes = SOUND[name]
    tokenizer = tiny_tokenizer()
    model = random_teacher(shape, 0, vocab_size=len(tokenizer) + 7, **changes)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=parts)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="hostile"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place
