"""Checkpoints on disk: models with the teacher's tokenizer beside them, and the run's final result."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from flashmorph import ranks
from flashmorph.files import atomic_path, read_json, write_json
from flashmorph.hosts import host_of
from flashmorph.layerwise import transplant_checkpoint
from flashmorph.plan import Plan
from flashmorph.progress import Report
from flashmorph.recipe import Recipe
from flashmorph.sharding import is_sharded, whole
from flashmorph.teacher import Teacher

_TRAVELS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def save_model(model: PreTrainedModel, folder: Path, origin: Path) -> None:
    """Save `model` in the dtype of the checkpoint in `origin`, with its tokenizer, template and generation settings.

    Of several processes the first writes; if the model's weights are divided, all must be here.

    Raises:
        UserError: the place cannot be written.
    """
    dtype = AutoConfig.from_pretrained(origin, trust_remote_code=False).dtype or torch.float32
    state = None
    if is_sharded(model):
        tied = model.all_tied_weights_keys or {}
        single = {name: weight for name, weight in model.state_dict().items() if name not in tied}
        state = {name: weight.to(dtype) for name, weight in whole(single).items()}
    else:
        nn.Module.to(model, dtype)
    if not ranks.is_first():
        return
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        complete(temporary, model.config, origin)


def complete(folder: Path, config: PreTrainedConfig, origin: Path) -> None:
    """Make what transformers has saved in `folder`, with this configuration, what we publish.

    Its config.json says what engines read, not only what transformers does (`Host.written`); tokenizer, template and
    generation settings come from `origin`.
    """
    values = read_json(folder / "config.json")
    if (wanted := host_of(config).written(values)) != values:
        write_json(folder / "config.json", wanted)
    for pattern in _TRAVELS:
        for path in origin.glob(pattern):
            shutil.copy2(path, folder / path.name)


def write_host(
    teacher: Teacher, folder: Path, settings: Mapping[str, Any], device: torch.device, report: Report
) -> dict[str, Any]:
    """Write the host in the teacher's own dtype into `folder`; what the move was proven by, and a `summary`.

    `settings` are the host's own.

    Raises:
        UserError: see `flashmorph.layerwise.transplant_checkpoint`; or `folder` cannot be written.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        config, moved = transplant_checkpoint(teacher.folder, temporary, settings, device, report)
        complete(temporary, config, teacher.folder)
    proof, parts = moved.proof, {name: part.to_dict() for name, part in moved.parts.items()}
    record: dict[str, Any] = {"proof": proof.to_dict(), "proof_of_parts": parts}
    summary = f"logits differ by at most {proof.difference:.1e} (allowed: {proof.tolerance:.1e})"
    if moved.rounding is not None:
        record["rounding"] = moved.rounding
        dtype = str(config.dtype).removeprefix("torch.")
        summary += f"; in {dtype} {moved.rounding:.2f} x the teacher's own rounding noise"
    return {**record, "summary": summary}


def publish(folder: Path, model: Path, plan: Plan, results: dict[str, Any], recipe: Recipe, card: str) -> None:
    """Make `folder` itself the checkpoint in `model`, with plan, results, recipe and card beside it.

    Each file is replaced whole; what an earlier run published stays in its stage's folder.

    Raises:
        UserError: the place cannot be written.
    """
    for path in sorted((model / "model").iterdir()):
        with atomic_path(folder / path.name) as temporary:
            shutil.copy2(path, temporary)
    plan.save(folder / "plan.json")
    write_json(folder / "results.json", results)
    for name, text in (("recipe.yaml", recipe.to_yaml()), ("README.md", card)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
