"""Open a teacher: an embedded one, a local folder or a model of the hub. Refuse what cannot be a teacher."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flashmorph.checkpoint import (
    CONFIG,
    GENERATION,
    has_tokenizer,
    is_present,
    require_config,
    travelling_files,
    weight_files,
)
from flashmorph.configuration import make_config
from flashmorph.digests import template_digest, tokenizer_digest, weights_digest
from flashmorph.emptymodel import without_weights
from flashmorph.errors import UserError, first_line
from flashmorph.files import read_json
from flashmorph.hosts import host_for, takes_with_windows, use_kernels
from flashmorph.shards import FLOATS, ShardReader
from flashmorph.stored import require_layers, take_stock

EMBEDDED = ("tiny",)
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_OTHER_FORMS = ("consolidated*", "original/*", "onnx/*", "adapter_model*")
_NO_FOLDER = "no-adapter-is-loaded"


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
    if path.exists() or path.is_symlink() or name.startswith((".", "/", "~")) or name.count("/") > 1:
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
    """The configuration in `folder`, with what it leaves open or says wrongly of its own weights set right.

    Where it names no dtype that weights can have, it gets the one that most of them are stored in; a pad token outside
    the vocabulary is none.

    Raises:
        UserError: none there, not readable, of an unknown kind, quantised, or not of a causal language model alone.
    """
    config: Any = make_config(folder / CONFIG, require_config(folder))
    if config.dtype not in FLOATS.values():
        config.dtype = _stored_dtype(folder)
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise UserError(f"{folder / CONFIG} cannot be read: it is of no language model (it has no vocab_size)")
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and not 0 <= pad < config.vocab_size:
        config.pad_token_id = None
    return config


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """What most of the weights in `folder` are stored in; None where there are none, as beside a lone config.json."""
    try:
        reader = ShardReader(folder)
    except UserError:
        return None
    return reader.main_dtype


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device | None = None,
    tell: Callable[[str], None] = lambda notice: None,
    allow_unused: bool = False,
) -> PreTrainedModel:
    """The causal language model in `folder`, on `device` (the CPU by default), and nothing of an adapter beside it.

    What is stored and not used goes to `tell`, line by line; `allow_unused` as in `take_stock`.

    Raises:
        UserError: weights are missing, damaged, do not fit the configuration, or are not what would be computed.
    """
    config, generation, stored = load_config(folder), load_generation(folder), ShardReader(folder).dtypes
    require_layers(config, stored, folder)
    use_kernels(config.model_type)
    for notice in take_stock(without_weights(config), stored, folder, allow_unused).notices:
        tell(notice)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=copy.deepcopy(config),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            # With peft installed an adapter in the folder would be loaded; there is none in this sub-folder.
            adapter_kwargs={"subfolder": _NO_FOLDER},
            **({"generation_config": generation} if generation else {}),
        )
        model = opened[0]
    except Exception as error:
        raise unreadable(folder, error) from error
    if model.config.tie_word_embeddings:
        require_one_head(model, folder)
    model.config.dtype = config.dtype
    return model.eval().to(device or "cpu")


def require_one_head(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a head that the configuration ties to the embedding where both have values, and not the same.

    Raises:
        UserError: says what to set right.
    """
    head, embedding = (cast(Any, each).weight for each in (model.get_output_embeddings(), model.get_input_embeddings()))
    if not (head is embedding or head.is_meta or embedding.is_meta or torch.equal(head, embedding)):
        raise UserError(
            f"{folder} has a head of its own, and its config.json ties it to the embedding: set tie_word_embeddings to "
            "false there if the head is the right one"
        )


def read_generation(folder: Path) -> dict[str, Any]:
    """What generation_config.json in `folder` says, however transformers judges it; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / GENERATION
    values = read_json(path) if is_present(path) else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it is no JSON object")
    return values


def load_generation(folder: Path) -> GenerationConfig | None:
    """How the authors of the checkpoint in `folder` generate; None where they do not say.

    Of settings that contradict each other, which transformers refuses to read, the tokens alone: nothing of ours
    generates by the others.

    Raises:
        UserError: generation_config.json is damaged.
    """
    if not (values := read_generation(folder)):
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception:  # Whatever its checks raise.
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: values.get(name) for name in names})


def unreadable(folder: Path, error: Exception) -> UserError:
    """Why the weights in `folder` cannot be read, in one sentence."""
    return UserError(f"the weights in {folder} cannot be read, are they complete? {first_line(error)}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None where there is none.

    Raises:
        UserError: it is damaged, or has more tokens than the model has embeddings.
    """
    if not has_tokenizer(folder):
        return None
    travelling_files(folder)
    config: Any = load_config(folder)
    try:
        # With our configuration: its own reading of config.json would not be held against anything.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if len(tokenizer) > (size := config.vocab_size):
        raise UserError(f"the tokenizer in {folder} has {len(tokenizer):,} tokens and the model only {size:,}")
    return tokenizer


def _require_host(config: PreTrainedConfig) -> None:
    """Refuse a teacher that no host takes; one that takes it with windows only is left to the recipe's settings."""
    if not takes_with_windows(config):
        host_for(config)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=list(_OTHER_FORMS)))
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
        f"{first_line(error)}"
    )
