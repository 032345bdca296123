"""Which files in a folder are a checkpoint: its weights, tokenizer and settings. It names other kinds of folders."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from flashmorph.errors import UserError, cut, quoted
from flashmorph.files import is_lfs_pointer, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
_TOKENIZER = (
    r"tokenizer(_config)?\.json",
    r"tokenizer\.\d+(\.\d+)*\.json",
    r"tokenizer\.model(\.v\d+(m\d+)?)?",
    r"sentencepiece(\.bpe)?\.model",
    r"(spiece|spm)\.model",
    r"[\w.-]+\.tiktoken",
    r"tekken\.json",
    r"vocab\.(json|txt)",
    r"merges\.txt",
)
"""Names that tokenizers of transformers are read from, as regular expressions, like those below."""
_BESIDE = (
    r"(special_tokens_map|added_tokens|generation_config)\.json",
    r"chat_template\.(jinja|json)",
    r"additional_chat_templates/[\w.-]+\.jinja",
)
_WEIGHTS = (r"model\.safetensors(\.index\.json)?", r"model-.*-of-.*\.safetensors")
_CODE = (r"[a-z][a-z0-9]*_flashmorph\.py",)
"""Code of our own model type, which travels with its checkpoints; ours never run a folder's."""
_MOST_BYTES = 1 << 28
"""More than any tokenizer has; a longer file beside weights is none."""
BLOBS = "blobs"
"""The folder of the hub's cache that holds the files themselves."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ENDS_OF_WEIGHTS = (".safetensors", SAFE_WEIGHTS_INDEX_NAME, ".gguf", *(pattern[1:] for pattern in _PICKLED))
_IN_TRAINING = ("*.distcp", "*/*.distcp", "global_step*", "*/*_optim_states.pt", "zero_pp_rank_*", "rank*.pt")
"""Names of sharded weights of FSDP, PyTorch's distributed checkpoints and DeepSpeed."""
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_SENSES = ("vision", "visual", "audio", "vision_tower", "speech", "vit")
_PLAIN = re.compile(r"[^/\\\0]{1,240}\.safetensors")
"""A file in the same folder: without separators, so neither above it nor elsewhere."""


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the checkpoint in `folder`, as transformers chooses them.

    `model.safetensors`, or the files that its index names; others are not read, whatever lies beside them.

    Raises:
        UserError: there are none, and what there is instead; one is missing, a dead link or a git-LFS pointer.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if is_present(single):
        return [single]
    if not is_present(index):
        raise UserError(f"{folder} {_what_it_is(folder) or _weights_instead(folder)}")
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    if missing := [path.name for path in files if not is_present(path)]:
        raise UserError(f"{folder} lacks {missing[0]}, which its index names: the checkpoint is incomplete")
    return files


def names_weights(folder: Path) -> bool:
    """Whether any file in `folder` has a name that weights have, of whatever form, also a dead link."""
    return any(path.name.endswith(_ENDS_OF_WEIGHTS) for path in folder.iterdir())


def travelling_files(folder: Path) -> list[Path]:
    """The files that are copied with the weights: tokenizer, chat templates, generation settings; sorted.

    Regular files under the names that transformers reads, or links to such, as the hub's cache has them; their names
    are those in `folder`. Nothing else that lies there goes with them, so nothing that can be run.

    Raises:
        UserError: one is a dead link, a link that leads elsewhere, a git-LFS pointer, or too large for what it is.
    """
    files = sorted(path for path in _matching(folder, *_TOKENIZER, *_BESIDE) if is_present(path))
    for path in files:
        _require_own(folder, path)
    return files


def travelling_content(path: Path) -> bytes:
    """The content of a file that is copied, without settings that name code for a tokenizer, which is never copied.

    Raises:
        UserError: it is tokenizer_config.json, and no JSON.
    """
    if path.name != TOKENIZER_SETTINGS:
        return path.read_bytes()
    values = read_json(path)
    if not isinstance(values, dict) or "auto_map" not in values:
        return path.read_bytes()
    own = {name: value for name, value in values.items() if name != "auto_map"}
    return (json.dumps(own, indent=2, ensure_ascii=False) + "\n").encode()


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` has a tokenizer.

    Raises:
        UserError: it is a dead link or a git-LFS pointer.
    """
    return any([is_present(path) for path in _matching(folder, *_TOKENIZER)])


def _require_own(folder: Path, path: Path) -> None:
    """Refuse to copy files that do not belong to the checkpoint.

    Raises:
        UserError: a link out of the folder, but to the blobs of the hub's cache; or a file of too many bytes.
    """
    home, target = folder.resolve(), path.resolve()
    blobs = (home.parent / BLOBS, home.parent.parent / BLOBS)
    if not target.is_relative_to(home) and target.parent not in blobs:
        raise UserError(f"{path} is a link to {cut(str(target))}, out of the checkpoint: put the file itself there")
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, which is no file of a tokenizer: is it damaged?")


def checkpoint_files(folder: Path) -> list[Path]:
    """Every file in `folder` by whose name transformers would open it as this checkpoint's, also left-over ones."""
    return sorted(
        path
        for path in _matching(folder, r"config\.json", *_WEIGHTS, *_TOKENIZER, *_BESIDE, *_CODE)
        if not path.is_dir()
    )


def require_config(folder: Path) -> dict[str, Any]:
    """The content of config.json in `folder`, of a causal language model that transformers can open.

    Raises:
        UserError: there is none, and what the folder is instead; a dead link or a git-LFS pointer; a checkpoint that is
            quantised, multimodal, needs code of its own or is no causal language model.
    """
    path = folder / CONFIG
    if not is_present(path):
        raise UserError(f"{folder} {_what_it_is(folder) or f'has no {CONFIG}: it is no Hugging Face checkpoint'}")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it is no JSON object")
    _refuse_other_kinds(folder, values)
    return values


def is_present(path: Path) -> bool:
    """Whether `path` is a file with its content.

    Raises:
        UserError: it is a dead link, or git-LFS has put a pointer in its place.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {path.readlink()}, which is not there: download the checkpoint again, or copy it "
            "with the files that its links mean"
        )
    if not path.is_file():
        return False
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a git-LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")
    return True


def ignored_adapter(folder: Path) -> str:
    """A line about an adapter beside whole weights, which is never loaded; empty where there is none."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        return ""
    return (
        f"{folder} has an adapter beside its weights ({ADAPTER_CONFIG_NAME}): it is left out; if it is not merged into "
        "them yet, merge it first"
    )


def _matching(folder: Path, *patterns: str) -> set[Path]:
    """Files in `folder` with such names, also dead links, which `Path.glob` skips."""
    matching: set[Path] = set()
    for parent in {str(Path(pattern).parent) for pattern in patterns if "/" in pattern} | {"."}:
        inner = folder / parent
        paths = {path.relative_to(folder).as_posix(): path for path in (inner.iterdir() if inner.is_dir() else ())}
        matching |= {path for name, path in paths.items() if any(re.fullmatch(pattern, name) for pattern in patterns)}
    return matching


def _refuse_other_kinds(folder: Path, values: dict[str, Any]) -> None:
    """Refuse a config.json that transformers would refuse later, in many lines, or with a question.

    Raises:
        UserError: names what the checkpoint is, and what to give instead.
    """
    quantised = [name for name in ("quantization_config", "compression_config") if values.get(name)]
    quantised += [name for name in _QUANTISED if (folder / name).is_file()]
    if quantised:
        raise UserError(f"{folder} is quantised ({quantised[0]}); give the checkpoint it was made from")
    kind, names = values.get("model_type"), values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / CONFIG} cannot be read: architectures must be a list of names; got {quoted(names)}")
    made_for = cut(", ".join(names) or str(kind))
    parts = [name for name in values if name.endswith("_config") and name.removesuffix("_config") in _SENSES]
    if parts:
        raise UserError(
            f"{folder} is a multimodal checkpoint ({made_for}, with {parts[0]}); give a language model without it"
        )
    if values.get("auto_map") and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise UserError(
            f"{folder} needs modelling code of its own ({made_for}, auto_map in its config.json), which is not run; "
            "give a teacher of an architecture that transformers has"
        )
    causal = not names or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if values.get("is_encoder_decoder") or not causal:
        raise UserError(f"{folder} is no causal language model but {made_for}; give a decoder with its language head")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, from an index of them.

    Raises:
        UserError: it is no such index, or a file is not one beside it.
    """
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} cannot be read: it is no index of weights (weight_map, from names to files)")
    for weight, name in names.items():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise UserError(
                f"{index} cannot be read: weight_map gives {quoted(weight)} the file {quoted(name)}, which must be the "
                "name of a safetensors file beside it"
            )
    return names


def _what_it_is(folder: Path) -> str:
    """The kind of a folder that is no checkpoint of a whole model, and the remedy; empty if it is not recognised."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        base = _base_of(folder / ADAPTER_CONFIG_NAME)
        return (
            f"is an adapter{base}, no whole model: merge it into its base first (peft's merge_and_unload, then "
            "save_pretrained), and give the folder of the result"
        )
    if any(found for pattern in _IN_TRAINING for found in folder.glob(pattern)):
        return (
            "holds weights sharded over processes (FSDP or DeepSpeed): have the whole model written first "
            "(accelerate merge-weights, or DeepSpeed's zero_to_fp32.py --safe_serialization), and give that folder"
        )
    return ""


def _base_of(adapter: Path) -> str:
    try:
        values = read_json(adapter)
    except UserError:
        return ""
    name = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return f" of {cut(str(name))}" if name else ""


def _weights_instead(folder: Path) -> str:
    """A description of the files that are there instead of readable weights."""
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return f"lacks {SAFE_WEIGHTS_INDEX_NAME}, which says what is in {shards[0].name} and the others"
    if others := sorted(folder.glob("*.safetensors")):
        return f"has {others[0].name}, but neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"
    if any(found for pattern in _PICKLED for found in folder.glob(pattern)):
        return "has no safetensors weights (only pickled ones, which are not read: convert them)"
    if list(folder.glob("*.gguf")):
        return "has no safetensors weights but a GGUF file: give the checkpoint that it was made from"
    return "has no safetensors weights"
