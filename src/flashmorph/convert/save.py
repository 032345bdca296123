"""Checkpoints on disk: models with the teacher's tokenizer, and the run's final result."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from flashmorph import distributed
from flashmorph.convert.checkpoint import (
    CONFIG,
    GENERATION,
    TOKENIZER_SETTINGS,
    checkpoint_files,
    travelling_content,
    travelling_files,
)
from flashmorph.convert.load import load_config
from flashmorph.convert.streamed import transplant_checkpoint
from flashmorph.convert.teacher import Teacher
from flashmorph.devices import dtype_name
from flashmorph.files import atomic_path, read_json, write_json
from flashmorph.hosts import host_of
from flashmorph.model.sharding import is_sharded, whole
from flashmorph.progress import Report
from flashmorph.records import Figures


def save_model(model: PreTrainedModel, folder: Path, origin: Path) -> None:
    """Save `model` in the dtype of the checkpoint in `origin`, with its tokenizer, template and generation settings.

    A folder left by an interrupted save is replaced. Rank 0 writes; if the model is sharded, all ranks must call it.

    Raises:
        UserError: `folder` cannot be written.
    """
    dtype = load_config(origin).dtype or torch.float32
    state = None
    if is_sharded(model):
        tied = model.all_tied_weights_keys or {}
        single = {name: weight for name, weight in model.state_dict().items() if name not in tied}
        state = {name: weight.to(dtype) for name, weight in whole(single).items()}
    else:
        nn.Module.to(model, dtype)
    if not distributed.is_first():
        return
    with atomic_path(folder, over_folder=True) as temporary, _plain_generation(model):
        model.save_pretrained(temporary, state_dict=state)
        complete(temporary, model.config, origin)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within this, the model has the generation settings that its configuration implies.

    The teacher's generation_config.json is copied as a file: transformers does not save everything that it reads.
    """
    kept, model.generation_config = model.generation_config, GenerationConfig.from_model_config(model.config)
    try:
        yield
    finally:
        model.generation_config = kept


def complete(folder: Path, config: PreTrainedConfig, origin: Path) -> None:
    """Complete the checkpoint of configuration `config` that transformers has saved in `folder`.

    Its config.json gets the fields that engines read (`Host.serialise`), and the folder the code of a class that
    transformers does not have; tokenizer, template and generation settings
    come from `origin`. `use_cache: false`, which a teacher may have from its training, becomes true: generation needs
    the cache. safetensors makes weights readable for their owner only: they get the file mode of config.json.
    """
    host, values = host_of(config), read_json(folder / CONFIG)
    for code in host.travelling:
        shutil.copyfile(code, folder / code.name)
    if (serialised := host.serialise(values)) != values:
        write_json(folder / CONFIG, serialised)
    bring(origin, folder)
    for name in (CONFIG, GENERATION):
        if (folder / name).is_file():
            _use_cache(folder / name)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, weights)


def _use_cache(path: Path) -> None:
    """Turn `use_cache: false` in a file of settings into true."""
    if (values := read_json(path)).get("use_cache") is False:
        write_json(path, {**values, "use_cache": True})


def _copy(path: Path, target: Path) -> None:
    """Copy one file of a checkpoint in its published form."""
    if path.name == TOKENIZER_SETTINGS:
        target.write_bytes(travelling_content(path))
        return
    shutil.copy2(path, target)
    if path.name == GENERATION:
        _use_cache(target)


def bring(origin: Path, folder: Path) -> None:
    """Copy tokenizer, templates and generation settings from `origin` to `folder`, each file atomically.

    Raises:
        UserError: `folder` cannot be written.
    """
    brought = {path.relative_to(origin): path for path in travelling_files(origin)}
    for name, path in brought.items():
        content = travelling_content(path)
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            with atomic_path(folder / name) as temporary:
                _copy(path, temporary)
    for path in travelling_files(folder):
        # If the teacher has none, the file that transformers wrote stays: it agrees with config.json.
        if path.relative_to(folder) not in brought and path.name != GENERATION:
            path.unlink()


def write_host(
    teacher: Teacher,
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    report: Report,
    allow_unused: bool = False,
    over_folder: bool = False,
) -> Figures:
    """Write the host in the teacher's own dtype into `folder`.

    Args:
        teacher: The checkpoint that is transplanted.
        folder: Must not exist, unless `over_folder`.
        settings: The host's own, such as `{"mamba_expand": 1}`.
        device: Where layers are compared.
        report: Called with the parts done and all parts.
        allow_unused: Whether stored weights that are not used are reported instead of refused.
        over_folder: Whether a folder left by an interrupted transplant is replaced.

    Returns:
        The record of the stage: the proof on logits, one for each part, `notices` about stored weights that were left
        out, and a `summary` in words.

    Raises:
        UserError: see `flashmorph.convert.streamed.transplant_checkpoint`; or `folder` cannot be written.
    """
    with atomic_path(folder, over_folder) as temporary:
        temporary.mkdir()
        config, moved = transplant_checkpoint(teacher.folder, temporary, settings, device, report, allow_unused)
        complete(temporary, config, teacher.folder)
    proof, parts = moved.proof, {name: part.to_dict() for name, part in moved.parts.items()}
    record: Figures = {"proof": proof.to_dict(), "proof_of_parts": parts, "notices": list(moved.notices)}
    summary = f"logits differ by at most {proof.difference:.1e} (allowed: {proof.tolerance:.1e})"
    if moved.rounding is not None:
        record["rounding"] = moved.rounding
        dtype = dtype_name(config.dtype)
        summary += f"; in {dtype} {moved.rounding:.2f} x the teacher's own rounding noise"
    return {**record, "summary": summary}


def replace_checkpoint(folder: Path, source: Path, teacher: Path) -> None:
    """Replace the checkpoint in `folder` by that in `source`.

    Tokenizer, templates and generation settings come from `teacher`, which may have been edited since `source` was
    written. First all files are copied under temporary names. Then they are renamed, weights first. Then the
    rest of an earlier checkpoint is removed, such as a single weight file that would be opened instead of several.
    config.json is replaced last. Files that belong to no checkpoint are not touched.

    Raises:
        UserError: `folder` cannot be written.
    """
    brought = {path.relative_to(teacher): path for path in travelling_files(teacher)}
    kept = {path for path in travelling_files(source) if path.name != GENERATION}
    files = {path.relative_to(source): path for path in checkpoint_files(source) if path not in kept}
    files |= brought
    weights_last = sorted(files.keys() - {Path(CONFIG)}, key=lambda name: name.suffix == ".safetensors")
    with atomic_path(folder / CONFIG) as config:
        shutil.copy2(files[Path(CONFIG)], config)
        with ExitStack() as stack:  # Left in reverse order.
            for name in weights_last:
                _copy(files[name], stack.enter_context(atomic_path(folder / name)))
        for path in checkpoint_files(folder):
            if path.relative_to(folder) not in files:
                path.unlink()
