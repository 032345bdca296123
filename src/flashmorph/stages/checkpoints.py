"""Trainer's checkpoints that training can resume from: those that are complete and undamaged."""

import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from flashmorph.errors import first_line
from flashmorph.files import write_json
from flashmorph.inputs.shapes import Count, require_shape

FINISHED = "finished"
_NAME = re.compile(r"checkpoint-(\d{1,18})")
WEIGHTS = "trainable.safetensors"
SHARDS = "shards"
_UNSHARDED, _SHARDED = (WEIGHTS, OPTIMIZER_NAME), (f"{SHARDS}/.metadata",)
"""The files that hold the weights and the optimiser, of an unsharded model and of a sharded one."""
_LOG = logging.getLogger(__name__)


def finish(checkpoint: Path) -> None:
    """Mark a checkpoint as complete once it is flushed to disk; the mark holds the size of each file."""
    sizes = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != FINISHED):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    write_json(checkpoint / FINISHED, sizes)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, or None."""
    whole = [path.parent for path in (folder / "checkpoints").glob(f"checkpoint-*/{FINISHED}")]
    steps = {int(match[1]): path for path in whole if (match := _NAME.fullmatch(path.name))}
    return str(steps[max(steps)]) if steps else None


def drop_damaged(folder: Path) -> None:
    """Remove incomplete checkpoints, from a killed write, and damaged ones, which are logged.

    Trainer keeps the last two, complete or not: if one of them is damaged, a kill could leave none to resume from.
    """
    for checkpoint in sorted((folder / "checkpoints").glob("checkpoint-*")):
        damage = _damage(checkpoint) if (checkpoint / FINISHED).exists() else "it was not finished"
        if damage:
            if (checkpoint / FINISHED).exists():
                _LOG.warning("%s is damaged (%s): going on from the one before it", checkpoint, damage)
            shutil.rmtree(checkpoint, ignore_errors=True)


def _damage(checkpoint: Path) -> str:
    """The damage of a checkpoint in words; empty if it can be read."""
    try:
        sizes = json.loads((checkpoint / FINISHED).read_text())
        require_shape(sizes, dict[str, Count], FINISHED)
        needed = [TRAINER_STATE_NAME, SCHEDULER_NAME, *(_SHARDED if (checkpoint / SHARDS).exists() else _UNSHARDED)]
        if missing := [name for name in needed if not (checkpoint / name).is_file()]:
            return f"{missing[0]} is not there"
        for name, size in sizes.items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes of {size:,}"
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():
                        return f"{path.name} has another content than it had"
                # PyTorch reads the headers in between too, which zipfile passes over.
                with safe_globals():
                    torch.load(path, "meta", mmap=True, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text())
        require_shape(json.loads((checkpoint / TRAINER_STATE_NAME).read_text()), dict[str, Any], TRAINER_STATE_NAME)
    except Exception as error:  # zipfile and pickle fail in as many ways as what they are given.
        return first_line(error)
    return ""
