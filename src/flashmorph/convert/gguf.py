"""A GGUF file as a teacher: opened by transformers' own loader, once, into a checkpoint of safetensors.

That loader drops a file's rope scaling without a word, so that a Llama 3.2 opens with wrong frequencies. Here every
tensor of the file and every key of its rope scaling is used, or refused by name.
"""

import contextlib
import copy
import functools
import hashlib
import importlib
import io
import json
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flashmorph.convert.gguf_tokenizer import special_ids, tokenizer_of
from flashmorph.convert.load import load_tokenizer
from flashmorph.errors import UserError, first_line
from flashmorph.files import read_json, write_json
from flashmorph.mixers.products import head_dim_of

SUFFIX = ".gguf"
ORIGIN = "gguf.json"
"""In the folder of the checkpoint: name and digest of the file, and how its matrices were stored."""
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FREQUENCIES = "rope_freqs.weight"
_SCALING = ".rope.scaling."
_CLOSE = 1e-4
_FORM = 2
"""Counts what the same file was made into by versions of this module."""
_READ = {"context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout"}
_READ |= {f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")}
_READ |= {"attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base"}
_READ |= {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_USUAL = {"attention.causal": True, "expert_weights_norm": True, "expert_gating_func": 1, "rope.scale_linear": 1.0}
"""What other keys say of a model that does not need them; the rest of them say 0."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_gguf(name: str) -> bool:
    """Whether `name` is that of a GGUF file here."""
    return name.lower().endswith(SUFFIX) and Path(name).is_file()


def origin_of(folder: Path) -> str:
    """How a checkpoint came out of a GGUF file, for people: `dequantised Q4_1`; empty for other checkpoints."""
    path = folder / ORIGIN
    stored = read_json(path).get("stored") if path.is_file() else None
    return "" if stored is None else f"{'from' if stored in _PLAIN else 'dequantised'} {stored}"


def checkpoint_of(file: Path) -> Path:
    """The folder of the checkpoint that a GGUF file was made into, under its digest; the first call makes it.

    Quantised matrices become bfloat16; those in F32, F16 and BF16 keep their dtype. It lies in the user's cache, below
    `XDG_CACHE_HOME` (default `~/.cache`).

    Raises:
        UserError: the file is damaged, of an architecture that transformers does not read, or has something that would
            be dropped; or the package `gguf` is missing.
    """
    if find_spec("gguf") is None:
        raise UserError(f'{file} needs the package gguf: pip install "flashmorph[gguf]"')
    stat = file.stat()
    digest = _digest_of(file, stat.st_size, stat.st_mtime_ns)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashmorph" / "gguf"
    folder = cache / f"{digest[:16]}-{_FORM}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / ORIGIN).exists():
                _make(file, folder, digest)
    except OSError as error:
        raise UserError(f"{file} cannot be opened into {folder}: {error.strerror or error}") from error
    return folder


@functools.cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size that was changed then."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _make(file: Path, folder: Path, digest: str) -> None:
    reader, fields = _read(file)
    if (parts := fields.get("split.count", 1)) > 1:
        raise UserError(f"{file} is one of {parts} parts of a model: join them first, with `llama-gguf-split --merge`")
    tokenizer = tokenizer_of(file, fields)
    stored = _stored(reader)
    dtype = _PLAIN.get(stored, torch.bfloat16)
    model = _open(file, dtype, fields)
    _require_used(file, reader, fields, model)
    _set_rope(file, reader, fields, model.config)
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # transformers lets rank 0 alone write, and this may be the first rank of another machine.
        vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _require_same(file, fields, tokenizer, load_tokenizer(temporary))
        write_json(temporary / ORIGIN, {"file": file.name, "sha256": digest, "stored": stored})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(file: Path) -> tuple[Any, dict[str, Any]]:
    """The file's reader, and its fields by name."""
    try:
        reader = importlib.import_module("gguf").GGUFReader(file)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # Its reader checks little: damage shows as whatever numpy says.
        raise UserError(f"{file} cannot be read, is it complete? {first_line(error)}") from error


def _stored(reader: Any) -> str:
    """The name of the type that most of the file's matrices are in, by bytes."""
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _configured(config: Any, fields: dict[str, Any]) -> Any:
    """The loader's configuration with what the file says and the loader does not read.

    It takes heads of Qwen3 for 128 wide and its experts for 768, and special tokens that the file does not have for the
    first ones. Of some files it goes by their names and not by their architecture, whose tensors it then does not find.
    """
    architecture = str(fields.get("general.architecture"))
    if architecture in CONFIG_MAPPING and config.model_type != architecture:
        of_architecture = CONFIG_MAPPING[architecture]
        known = of_architecture().to_dict().keys() - {"model_type"}
        config = of_architecture(**{name: value for name, value in config.to_dict().items() if name in known})
    heads, width = config.num_attention_heads, fields.get(f"{architecture}.attention.key_length")
    if width or getattr(config, "head_dim", None):
        config.head_dim = width or config.hidden_size // heads
    if experts := fields.get(f"{architecture}.expert_feed_forward_length"):
        config.moe_intermediate_size = experts
    ids = special_ids(fields)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = ids["bos"], ids["eos"], ids["pad"]
    return config


def _open(file: Path, dtype: torch.dtype, fields: dict[str, Any]) -> PreTrainedModel:
    """The model as a plain one: the loader's own looks quantised and cannot be saved."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # A bar of its own, whatever is set.
            config = _configured(AutoConfig.from_pretrained(file.parent, gguf_file=file.name), fields)
            opened: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise UserError(f"{file} cannot be opened by transformers: {first_line(error)}") from error
    loaded, info = opened
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{file} has no weights for {missing[0]}" + (" and others" if len(missing) > 1 else ""))
    values = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    config = type(loaded.config)(**values)
    config.dtype = dtype
    with torch.device("meta"):
        model = type(loaded)(copy.deepcopy(config))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.to(dtype)


def _require_used(file: Path, reader: Any, fields: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse tensors that the loader drops, and keys that change what the model computes and that it does not read."""
    loading = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    processor = loading.TENSOR_PROCESSORS.get(fields.get("general.architecture"), loading.TensorProcessor)
    known = set(loading.get_gguf_hf_weights_map(model, processor(config={})))
    # Stacked experts are parameters without `.weight` in transformers.
    known |= {f"{name}.weight" for name in known if name.endswith("_exps")} | {_FREQUENCIES}
    unused = [tensor.name for tensor in reader.tensors if tensor.name not in known]
    if unused:
        others = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
        raise UserError(f"{file} has a tensor that {type(model).__name__} does not use: {unused[0]}{others}")
    width, context = head_dim_of(model.config), model.config.max_position_embeddings
    for name, value in fields.items():
        architecture, _, key = name.partition(".")
        if name.endswith(("attention.key_length", "attention.value_length", "rope.dimension_count")) and value != width:
            raise UserError(f"{file} has {name}={value}, and {type(model).__name__} heads of {width}")
        if key == "attention.sliding_window" and 0 < value < context:
            raise UserError(f"{file} has {name}={value}: teachers with a sliding window have no exact host")
        ours = architecture == fields.get("general.architecture") and key not in _READ and _SCALING not in name
        if ours and value != _USUAL.get(key, 0):
            raise UserError(f"{file} has {name}={value}, which {type(model).__name__} would not know of")


def _require_same(file: Path, fields: dict[str, Any], made: Any, read: Any) -> None:
    """Refuse a tokenizer that transformers reads as another: it gives models of some families the family's own."""
    parts = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")
    ours, theirs = (json.loads(each.backend_tokenizer.to_str()) for each in (made, read))
    same = all(ours[part] == theirs[part] for part in parts)
    if not same or ours["model"]["ignore_merges"] != theirs["model"]["ignore_merges"]:
        names = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        stated = ", ".join(f"{name}={fields.get(name)}" for name in names)
        raise UserError(f"{file} has {stated}: transformers reads {type(read).__name__} there, which cuts otherwise")


def _set_rope(file: Path, reader: Any, fields: dict[str, Any], config: Any) -> None:
    """Rope scaling as the file has it: `linear`, `yarn`, or Llama 3's by its table of frequencies.

    Raises:
        UserError: names what has no counterpart.
    """
    scaling = {name.rpartition(_SCALING)[2]: value for name, value in fields.items() if _SCALING in name}
    kind = scaling.pop("type", "none")
    rope = {**config.rope_parameters, "rope_type": "default"}
    taken = {"finetuned"}
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(scaling.get("factor", 1.0))}
        taken |= {"factor"}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(scaling.get("original_context_length", 0))
        taken |= {"original_context_length"}
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if theirs in scaling:
                rope[ours] = float(scaling[theirs])
                taken |= {theirs}
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _FREQUENCIES), None)
    left = sorted(set(scaling) - taken) if kind in ("none", "linear", "yarn") else ["type"]
    if left:
        value = {**scaling, "type": kind}[left[0]]
        raise UserError(f"{file} has rope.scaling.{left[0]}={value}, which has no counterpart in transformers here")
    if factors is not None:
        if kind != "none":
            raise UserError(f"{file} has {_FREQUENCIES} beside rope.scaling.type={kind}: it does not say which holds")
        found = _llama3(np.asarray(factors, dtype=np.float64).ravel(), rope["rope_theta"])
        if found is None:
            raise UserError(f"{file} has frequencies in {_FREQUENCIES} that no rope type of transformers gives")
        rope |= found
    config.rope_parameters = rope


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Settings of rope type `llama3` that divide the frequencies by `factors` `[head_dim / 2]`; None if none does.

    With wavelengths w a factor is `1 / ((1 - s) / factor + s)`, `s = (original / w - low) / (high - low)` between 0 and
    1: s is a line in 1 / w, which two frequencies in between give. Its two numbers leave `low` free, which is 1.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    factor = float(factors.max())
    if factor <= 1:
        return {} if np.allclose(factors, 1) else None
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    candidates = [{"factor": factor, **_LLAMA3}]
    if between.sum() >= 2:
        slope, offset = np.polyfit(1 / wavelengths[between], smooth[between], 1)
        if slope > 0 > offset:
            fitted = {"high_freq_factor": round(1 - 1 / offset, 3)}
            fitted["original_max_position_embeddings"] = round(-slope / offset)
            candidates += [{"factor": factor, "low_freq_factor": 1.0, **fitted}]
    for found in candidates:
        low, high = found["low_freq_factor"], found["high_freq_factor"]
        share = np.clip((found["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
        if np.abs((1 - share) / factor + share - 1 / factors).max() < _CLOSE / factor:
            return {"rope_type": "llama3", **found}
    return None
