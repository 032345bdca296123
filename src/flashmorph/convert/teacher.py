"""Open a teacher: an embedded one, a local folder or a model of the hub. Refuse what cannot be a teacher."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flashmorph import distributed
from flashmorph.convert.checkpoint import names_weights, weight_files
from flashmorph.convert.digests import template_digest, tokenizer_digest, weights_digest
from flashmorph.convert.gguf import checkpoint_of, is_gguf, origin_of
from flashmorph.convert.hub import EMBEDDED, embedded_folder, fetched, fetched_config, without_revision
from flashmorph.convert.load import load_config, load_model, load_tokenizer, read_generation
from flashmorph.errors import OnEveryRank, UserError
from flashmorph.files import names_a_path
from flashmorph.hosts import host_for, takes_with_windows

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A checkpoint on disk; `revision` is the hub's commit, if any, and no part of `name`.

    `digest` covers its configuration and weights, `tokenizer_digest` what makes tokens of a text, `template_digest`
    what makes a text of a conversation.
    """

    name: str
    folder: Path
    digest: str
    revision: str
    note: str = ""
    tokenizer_digest: str = ""
    template_digest: str = ""

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Its configuration, read once: no caller changes it.

        Raises:
            UserError: a value that no model can have.
        """
        return load_config(self.folder)

    def load(self, dtype: torch.dtype | str, device: torch.device | None = None) -> PreTrainedModel:
        """The model, in `dtype` on `device`.

        Raises:
            UserError: a checkpoint that is damaged, incomplete or not of a supported kind.
        """
        return load_model(self.folder, dtype, device)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where the folder has none.

        Raises:
            UserError: it has more tokens than the model has embeddings.
        """
        return load_tokenizer(self.folder)

    def generation(self) -> dict[str, Any]:
        """The content of generation_config.json, unchecked by transformers; empty if there is none.

        Raises:
            UserError: it is no JSON.
        """
        return read_generation(self.folder)


def open_teacher(name: str) -> Teacher:
    """Find a teacher by name and check that it has an exact host, before any weight is read.

    Raises:
        UserError: nothing there, no weights, or no exact host.
    """
    folder, revision, note = locate(name)
    _require_host(load_config(folder))
    weight_files(folder)
    read_generation(folder)
    of_tokens, of_template = tokenizer_digest(folder), template_digest(folder)
    plain = without_revision(name) if revision else name
    return Teacher(plain, folder, weights_digest(folder), revision, note, of_tokens, of_template)


def open_without_weights(name: str) -> Teacher:
    """`open_teacher` for a dry run: weights are neither fetched nor read, so `digest` is empty.

    A local folder needs no weights at all; the note says where they are not there. A GGUF file is opened whole, into
    the checkpoint that the run takes.

    Raises:
        UserError: nothing there, weights of a local folder that `open_teacher` refuses, or no exact host.
    """
    folder, revision, note = locate(name, weights=False)
    _require_host(load_config(folder))
    read_generation(folder)
    of_tokens, of_template = tokenizer_digest(folder), template_digest(folder)
    plain = without_revision(name) if revision else name
    note = note or _about_weights(name, folder, revision)
    return Teacher(plain, folder, "", revision, note, of_tokens, of_template)


def _about_weights(name: str, folder: Path, revision: str) -> str:
    """What a run will check of weights that are not there; empty where their files are all there.

    Raises:
        UserError: a local folder has some of them, or has them in a form that is not read.
    """
    try:
        weight_files(folder)
    except UserError:
        if not revision and names_weights(folder):
            raise
        missing = f"the weights of {name} were not fetched" if revision else f"{folder} has no weights"
        return f"{missing}: that they are all there and fit config.json is checked by the run alone"
    return ""


def open_on_every_machine(name: str) -> Teacher:
    """`open_teacher` for all ranks, once a machine: the cache of the hub and of GGUF files may be its own.

    Raises:
        UserError: see `open_teacher`; or the machines have different teachers of that name.
    """
    first = distributed.first(lambda: open_teacher(name))
    if distributed.count() == 1:
        return first
    own: Teacher | str = first
    if distributed.local_rank() == 0 and not distributed.is_first():
        try:
            own = distributed.alone(lambda: open_teacher(name))
        except UserError as error:
            own = str(error)
    opened = distributed.gather(own)
    for rank, there in enumerate(opened):
        if isinstance(there, str):
            raise OnEveryRank(f"on the machine of rank {rank}: {there}")
        if _content(there) != _content(first):
            raise OnEveryRank(
                f"{name} is not the same on all machines: {there.folder} on that of rank {rank} has other files than "
                f"{first.folder} on that of rank 0; give both the same, or one cache that they share (HF_HOME)"
            )
    # torchrun numbers the ranks of a machine one after the other.
    return cast(Teacher, opened[distributed.rank() - distributed.local_rank()])


def _content(teacher: Teacher) -> tuple[str, str, str]:
    return teacher.digest, teacher.tokenizer_digest, teacher.template_digest


def locate(name: str, weights: bool = True) -> tuple[Path, str, str]:
    """Folder, revision and a note for the user: a local folder or GGUF file, an embedded teacher or a model of the hub.

    Without `weights` those of a model of the hub are not fetched.

    Raises:
        UserError: there is nothing of that name.
    """
    path = Path(name)
    if path.is_dir():
        embedded = f"{name!r} is a folder here: it is used instead of the embedded teacher of that name"
        return path, "", embedded if name in EMBEDDED else ""
    if is_gguf(name):
        folder = checkpoint_of(path.resolve())
        return folder, "", f"{name}: {origin_of(folder)}, as a checkpoint in {folder}"
    if name in EMBEDDED:
        return embedded_folder(name), "", ""
    if path.exists() or path.is_symlink() or names_a_path(without_revision(name)):
        raise UserError(
            f"there is no folder {name!r}: give a folder with config.json and safetensors, a GGUF file, or a hub name"
        )
    folder = fetched(name, weights)
    return folder, folder.name, ""


def open_config(name: str):
    """The configuration of a teacher that has an exact host, without its weights: of a model of the hub, config.json
    alone is fetched, and a local folder needs no more.

    Raises:
        UserError: nothing there, not readable, or no exact host.
    """
    local = name in EMBEDDED or Path(name).exists() or names_a_path(without_revision(name))
    config = load_config(locate(name)[0] if local else fetched_config(name))
    _require_host(config)
    return config


def open_model(
    name: str,
    device: torch.device,
    say: Callable[[str], None] = _LOG.warning,
    allow_unused: bool = False,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, by folder or name.

    `dtype` is a name or `auto`, the checkpoint's own; without it float32 on a CPU, elsewhere the checkpoint's own.

    Stored weights that are not used are reported to `say`; see `load_model`.

    Raises:
        UserError: nothing there, damaged, or without a tokenizer.
    """
    folder, _, _ = locate(name)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer")
    usual = "float32" if device.type == "cpu" else "auto"
    return load_model(folder, dtype or usual, device, say, allow_unused), tokenizer


def _require_host(config: PreTrainedConfig) -> None:
    """Refuse a teacher that no host takes; one that takes it with windows only is left to the recipe's settings."""
    if not takes_with_windows(config):
        host_for(config)
