"""Checks the values of a config.json before transformers builds a model from them.

A number that is no size makes transformers fail in many lines, or build for hours. And what a model is computed with is
ours: nothing in a config.json chooses code, or the outputs of a forward.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from flashmorph.errors import UserError, first_line, quoted
from flashmorph.hosts import ALL_HOSTS, HOST_TYPES
from flashmorph.hosts.checks import family_of
from flashmorph.inputs.settings import in_words

_Layers = Annotated[int, Field(ge=1, lt=10_000)] | None
_Heads = Annotated[int, Field(ge=1, lt=1 << 16)] | None
_Width = Annotated[int, Field(ge=1, lt=1 << 20)] | None
_Size = Annotated[int, Field(ge=1, lt=1 << 24)] | None
_Tokens = Annotated[int, Field(ge=1, lt=1 << 31)] | None
_Number = Annotated[int, Field(ge=0, lt=1 << 16)] | None
_Positive = Annotated[float, Field(gt=0)] | None
_Share = Annotated[float, Field(ge=0, le=1)] | None


class _Numbers(BaseModel):
    """The values that models are built by, each as it may be; those that a family does not have are not there."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    num_hidden_layers: _Layers = None
    max_window_layers: _Number = None
    no_rope_layer_interval: _Layers = None
    vocab_size: _Size = None
    hidden_size: _Width = None
    intermediate_size: _Size = None
    moe_intermediate_size: _Size = None
    shared_intermediate_size: _Size = None
    shared_expert_intermediate_size: _Number = None
    num_attention_heads: _Heads = None
    num_key_value_heads: _Heads = None
    head_dim: _Heads = None
    max_position_embeddings: _Tokens = None
    original_max_position_embeddings: _Tokens = None
    sliding_window: _Tokens = None
    num_experts: _Number = None
    num_local_experts: _Number = None
    num_experts_per_tok: _Number = None
    decoder_sparse_step: _Layers = None
    linear_conv_kernel_dim: _Heads = None
    linear_key_head_dim: _Heads = None
    linear_value_head_dim: _Heads = None
    linear_num_key_heads: _Heads = None
    linear_num_value_heads: _Heads = None
    mamba_n_heads: _Width = None
    mamba_n_groups: _Heads = None
    mamba_d_state: _Heads = None
    mamba_d_conv: _Heads = None
    mamba_expand: _Heads = None
    mamba_chunk_size: _Width = None
    rms_norm_eps: _Positive = None
    rope_theta: _Positive = None
    partial_rotary_factor: _Positive = None
    embedding_multiplier: _Positive = None
    residual_multiplier: _Positive = None
    logits_scaling: _Positive = None
    attention_multiplier: _Positive = None
    attention_dropout: _Share = None
    initializer_range: _Share = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    norm_topk_prob: bool | None = None


class _Rope(BaseModel):
    """The values of a rotary embedding."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive = None
    factor: _Positive = None
    attention_factor: _Positive = None
    beta_fast: _Positive = None
    beta_slow: _Positive = None
    low_freq_factor: _Positive = None
    high_freq_factor: _Positive = None
    partial_rotary_factor: _Positive = None
    original_max_position_embeddings: _Tokens = None


_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
           "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
"""Fields that a family with them requires."""
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_ROPES = ("rope_parameters", "rope_scaling")
_NOT_READ = (
    # Which code computes; a name of a repository would be fetched from the hub and run.
    "attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset "
    "experts_implementation _experts_implementation _experts_implementation_internal _flash_attn_2_enabled "
    "auto_map custom_pipelines quantization_config compression_config use_kernels kernel_config "
    # Other files in place of this one, and what a forward returns.
    "configuration_files name_or_path _name_or_path output_attentions output_hidden_states return_dict use_return_dict "
    # Traces; and labels of classifiers, in any number.
    "torchscript num_labels id2label label2id"
).split()


def families() -> set[str]:
    """The `model_type` of every teacher that has a host, and of every host."""
    return {family for host in ALL_HOSTS for family in host.teachers} | HOST_TYPES


def make_config(path: Path, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that the `values` of the config.json at `path` describe.

    Nothing of what chooses code is in it. Of a family without a host only the number of layers is looked at.

    Raises:
        UserError: names a value that no model can have, and what would be right; or an unknown `model_type`.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        _refuse(path, f"model_type is {quoted(kind)}, which this version of transformers does not know")
    kind = family_of(kind, values)
    known, maker = kind in families(), CONFIG_MAPPING[kind]
    values = {name: _read(value) for name, value in values.items() if name not in (*_NOT_READ, "model_type")}
    _require_names(path, values, maker)
    _require_numbers(path, _Numbers, values if known else {"num_hidden_layers": values.get("num_hidden_layers")})
    _require_dtype(path, values)
    _require_tokens(path, values)
    if known:
        _require_rope(path, values)
    try:
        config = maker.from_dict({**values, "name_or_path": str(path.parent)})
    except Exception as error:  # Among others validation errors of huggingface_hub, which share no class of their own.
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if known:
        _require_consistent(path, config)
    return config


def _read(value: Any) -> Any:
    """A value as transformers means it: JSON has no infinity, so it writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _read(each) for name, each in value.items()}
    return [_read(each) for each in value] if isinstance(value, list) else value


def _refuse(path: Path, what: str) -> NoReturn:
    raise UserError(f"{path} cannot be read: {what}")


def _require_names(path: Path, values: Mapping[str, Any], maker: type) -> None:
    """Refuse a value that would replace a part of transformers' own class."""
    for name in values:
        own = getattr(maker, name, None)
        if name.startswith("__") or name in ("attribute_map", "per_layer_config") or callable(own):
            _refuse(path, f"{quoted(name)} is no setting of a model")


def _require_numbers(path: Path, table: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> None:
    try:
        table.model_validate(dict(values))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        schema = table.model_json_schema()["properties"][name]
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        right = " or ".join(in_words(kind) for kind in kinds)
        _refuse(path, f"{prefix}{name} must be {right}; got {quoted(values[name])}")


def _require_dtype(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse what weights are not computed in; of 8 bits are weights that have been made whole numbers of again."""
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        if dtype is not None and not (isinstance(dtype, str) and (dtype in _DTYPES or dtype.startswith("float8_"))):
            _refuse(path, f"{name} must be {', '.join(_DTYPES)} or null; got {quoted(dtype)}")


def _require_rope(path: Path, values: Mapping[str, Any]) -> None:
    for name in _ROPES:
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _refuse(path, f"{name} must be an object or null; got {quoted(rope)}")
        _require_numbers(path, _Rope, rope, f"{name}.")
        for factors in ("short_factor", "long_factor"):
            if factors in rope and not (isinstance(rope[factors], list) and all(map(_is_positive, rope[factors]))):
                _refuse(path, f"{name}.{factors} must be a list of numbers above 0; got {quoted(rope[factors])}")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e30 and math.isfinite(value)


def _require_tokens(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse what is no token; a pad token outside the vocabulary, as many have it, is none, and others are refused."""
    size = values.get("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = values.get(name)
        each = given if isinstance(given, list) and name != "pad_token_id" else [given]
        if given is not None and not all(type(token) is int for token in each):
            several = "" if name == "pad_token_id" else ", several of them"
            _refuse(path, f"{name} must be the number of a token{several} or null; got {quoted(given)}")
        outside = [token for token in each if isinstance(size, int) and type(token) is int and not 0 <= token < size]
        if outside and name != "pad_token_id":
            _refuse(path, f"{name} must be within the vocabulary of {size:,} tokens, or null; got {quoted(outside[0])}")


def _require_consistent(path: Path, config: Any) -> None:
    """Look at what transformers has made of the values, with its defaults for those that are not there."""
    present = {name: getattr(config, name) for name in _Numbers.model_fields if hasattr(config, name)}
    _require_numbers(path, _Numbers, present)
    if missing := [name for name in _NEEDED if name in present and present[name] is None]:
        _refuse(path, f"{missing[0]} must have a value; got null")
    heads, groups, width = (present.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and groups and heads % groups:
        _refuse(path, f"num_attention_heads is {heads:,}, no multiple of num_key_value_heads, {groups:,}")
    if heads and width and not present.get("head_dim") and width % heads:
        _refuse(path, f"hidden_size is {width:,}, no multiple of num_attention_heads, {heads:,}")
    if heads and width and (of_head := present.get("head_dim") or width // heads) % 2:
        _refuse(path, f"heads are {of_head:,} wide; rotary embeddings need an even width")
    experts = present.get("num_experts") or present.get("num_local_experts") or 0
    if (chosen := present.get("num_experts_per_tok")) and chosen > experts:
        _refuse(path, f"num_experts_per_tok is {chosen:,}, more than the {experts:,} experts")
    types, layers = getattr(config, "layer_types", None), present.get("num_hidden_layers")
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        _refuse(path, f"layer_types must have a word for each of the {layers:,} layers; got {quoted(types)}")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_type"), str):
        _refuse(path, f"rope_parameters must be an object with rope_type; got {quoted(rope)}")
