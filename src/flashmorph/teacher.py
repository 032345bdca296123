"""Open a teacher: an embedded one, a local folder or a model of the hub. Refuse what cannot be a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flashmorph.errors import UserError
from flashmorph.files import GENERATION, read_json, template_digest, tokenizer_digest, weights_digest
from flashmorph.hosts import host_for, takes_with_windows

EMBEDDED = ("tiny",)
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_SENSES = ("vision", "visual", "audio", "vision_tower", "speech", "vit")
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Teacher:
    """A checkpoint on disk; `revision` is the hub's commit, if any.

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
        """What generation_config.json says, however transformers judges it; nothing where there is none.

        Raises:
            UserError: it is no JSON.
        """
        path = self.folder / GENERATION
        values = read_json(path) if path.is_file() else {}
        if not isinstance(values, dict):
            raise UserError(f"{path} cannot be read: it is no JSON object")
        return values


def open_teacher(name: str) -> Teacher:
    """Find a teacher by name and check that it has an exact host, before any weight is read.

    Raises:
        UserError: nothing there, no weights, or no exact host.
    """
    folder, revision, note = locate(name)
    _require_host(load_config(folder))
    require_safetensors(folder)
    of_tokens, of_template = tokenizer_digest(folder), template_digest(folder)
    return Teacher(name, folder, weights_digest(folder), revision, note, of_tokens, of_template)


def locate(name: str) -> tuple[Path, str, str]:
    """Folder, revision and a note for the user: a local folder, an embedded teacher or a model of the hub.

    Raises:
        UserError: there is nothing of that name.
    """
    path = Path(name)
    if path.is_dir():
        embedded = f"{name!r} is a folder here: it is used instead of the embedded teacher of that name"
        return path, "", embedded if name in EMBEDDED else ""
    if name in EMBEDDED:
        return Path(str(files("flashmorph") / "assets" / name)), "", ""
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name!r}: give a folder with config.json and safetensors, or a hub name")
    folder = _download(name)
    return folder, folder.name, ""


def open_config(name: str):
    """The configuration of a teacher that has an exact host, without its weights: of a model of the hub, config.json
    alone is fetched, and a local folder needs no more.

    Raises:
        UserError: nothing there, not readable, or no exact host.
    """
    local = name in EMBEDDED or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    config = load_config(locate(name)[0] if local else _fetch_config(name))
    _require_host(config)
    return config


def load_config(folder: Path):
    """The configuration in `folder`.

    Raises:
        UserError: none there, not readable, of an unknown kind, quantised, or not of a causal language model alone.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is no Hugging Face checkpoint")
    _refuse_other_kinds(folder, read_json(path))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from error


def _refuse_other_kinds(folder: Path, values: Any) -> None:
    """Say of a config.json what transformers would say late, in many lines, or with a question.

    Raises:
        UserError: names what the checkpoint is, and what to give instead.
    """
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} cannot be read: it is no JSON object")
    quantised = [name for name in ("quantization_config", "compression_config") if values.get(name)]
    quantised += [name for name in _QUANTISED if (folder / name).is_file()]
    if quantised:
        raise UserError(f"{folder} is quantised ({quantised[0]}); give the checkpoint it was made from")
    made_for = ", ".join(values.get("architectures") or []) or str(values.get("model_type"))
    parts = [name for name in values if name.endswith("_config") and name.removesuffix("_config") in _SENSES]
    if parts:
        raise UserError(
            f"{folder} is a multimodal checkpoint ({made_for}, with {parts[0]}); give a language model without it"
        )
    if values.get("auto_map") and values.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{folder} needs modelling code of its own ({made_for}, auto_map in its config.json), which is not run; "
            "give a teacher of an architecture that transformers has"
        )
    names = values.get("architectures") or ["ForCausalLM"]
    if values.get("is_encoder_decoder") or not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise UserError(f"{folder} is no causal language model but {made_for}; give a decoder with its language head")


def load_model(folder: Path, dtype: torch.dtype | str, device: torch.device | None = None) -> PreTrainedModel:
    """The causal language model in `folder`, on `device` (the CPU by default).

    Raises:
        UserError: weights are missing, damaged, or do not fit the configuration.
    """
    require_safetensors(folder)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        model, info = opened
    except Exception as error:
        raise unreadable(folder, error) from error
    if info["missing_keys"]:
        raise incomplete(folder, sorted(info["missing_keys"]))
    model.config.dtype = load_config(folder).dtype
    return model.eval().to(device or "cpu")


def unreadable(folder: Path, error: Exception) -> UserError:
    """Why the weights in `folder` cannot be read, in one sentence."""
    return UserError(f"the weights in {folder} cannot be read, are they complete? {_first_line(error)}")


def incomplete(folder: Path, missing: Sequence[str]) -> UserError:
    """That these weights are not in `folder`, in one sentence."""
    return UserError(f"{folder} lacks {len(missing)} weights, {missing[0]} first: the checkpoint is incomplete")


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without weights in safetensors.

    Raises:
        UserError: there are none, or only pickled ones.
    """
    if not list(folder.glob("*.safetensors")):
        pickled = " (only pickled ones, which are not read: convert them)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{folder} has no safetensors weights{pickled}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None where there is none.

    Raises:
        UserError: it is damaged, or has more tokens than the model has embeddings.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
    size = load_config(folder).vocab_size
    if len(tokenizer) > size:
        raise UserError(f"the tokenizer in {folder} has {len(tokenizer):,} tokens and the model only {size:,}")
    return tokenizer


def _require_host(config: PreTrainedConfig) -> None:
    """Refuse a teacher that no host takes; one that takes it with windows only is left to the recipe's settings."""
    if not takes_with_windows(config):
        host_for(config)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:
        raise _not_on_the_hub(name, error) from error


def _fetch_config(name: str) -> Path:
    """The folder of config.json, fetched alone."""
    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:
        raise _not_on_the_hub(name, error) from error


def _not_on_the_hub(name: str, error: Exception) -> UserError:
    embedded = ", ".join(EMBEDDED)
    return UserError(
        f"there is no teacher {name!r}: it is no folder here, not embedded ({embedded}), and the hub says: "
        f"{_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
