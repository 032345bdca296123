"""Open a checkpoint on disk: its configuration, weights, tokenizer and generation settings."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flashmorph.convert.checkpoint import (
    CONFIG,
    GENERATION,
    has_tokenizer,
    is_present,
    require_config,
    travelling_files,
)
from flashmorph.convert.configuration import make_config
from flashmorph.convert.shards import FLOATS, ShardReader, unreadable
from flashmorph.convert.stored import require_layers, take_stock
from flashmorph.errors import UserError, first_line
from flashmorph.files import read_json
from flashmorph.hosts import misreads_tokenizer, use_kernels
from flashmorph.hosts.build import without_weights

_NO_FOLDER = "no-adapter-is-loaded"
_LOG = logging.getLogger(__name__)


def load_config(folder: Path):
    """The configuration in `folder`, corrected where it is wrong or silent about its own weights.

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
    """The dtype of most weights in `folder`; None if there are none, as beside a lone config.json."""
    try:
        reader = ShardReader(folder)
    except UserError:
        return None
    return reader.main_dtype


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device | None = None,
    say: Callable[[str], None] = _LOG.warning,
    allow_unused: bool = False,
) -> PreTrainedModel:
    """The causal language model in `folder`, on `device` (the CPU by default), and nothing of an adapter beside it.

    Stored weights that are not used are reported to `say`, line by line; `allow_unused` as in `take_stock`.

    Raises:
        UserError: weights are missing, damaged, do not fit the configuration, or are not what would be computed.
    """
    config, generation, stored = load_config(folder), load_generation(folder), ShardReader(folder).dtypes
    require_layers(config, stored, folder)
    use_kernels(config.model_type)
    for notice in take_stock(without_weights(config), stored, folder, allow_unused).notices:
        say(notice)
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
            **_straight_to(device),
            **({"generation_config": generation} if generation else {}),
        )
        model = opened[0]
    except Exception as error:
        raise unreadable(folder, error) from error
    if model.config.tie_word_embeddings:
        require_one_head(model, folder)
    model.config.dtype = config.dtype
    return model.eval().to(device or "cpu")


def _straight_to(device: torch.device | None) -> dict[str, Any]:
    """Arguments by which each weight goes to a GPU as it is read.

    Otherwise all of them stand in the CPU's memory first, once for every rank of a machine.
    """
    return {"device_map": {"": device}} if device is not None and device.type == "cuda" else {}


def require_one_head(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a head that the configuration ties to the embedding where both have values, and not the same.

    Raises:
        UserError: names the values to correct.
    """
    head, embedding = (cast(Any, each).weight for each in (model.get_output_embeddings(), model.get_input_embeddings()))
    if not (head is embedding or head.is_meta or embedding.is_meta or torch.equal(head, embedding)):
        raise UserError(
            f"{folder} has a head of its own, and its config.json ties it to the embedding: set tie_word_embeddings to "
            "false there if the head is the right one"
        )


def read_generation(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json in `folder`, unchecked by transformers; empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / GENERATION
    values = read_json(path) if is_present(path) else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it is no JSON object")
    return values


def load_generation(folder: Path) -> GenerationConfig | None:
    """The authors' generation settings for the checkpoint in `folder`; None if there are none.

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
        if misreads_tokenizer(config.model_type) and is_present(folder / "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            # With our configuration: its own reading of config.json would not be checked.
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if len(tokenizer) > (size := config.vocab_size):
        raise UserError(f"the tokenizer in {folder} has {len(tokenizer):,} tokens and the model only {size:,}")
    return tokenizer
