"""The weights in a checkpoint's files, compared with those that transformers uses: the rest is decided here alone.

A proof that compares two models sees what was loaded, not what was left out. So before any weight is read, every stored
name is followed through the renaming of loading; weights that no part of the model uses are reported or refused.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from flashmorph.convert.checkpoint import ignored_adapter
from flashmorph.convert.shards import FLOATS
from flashmorph.errors import UserError, cut
from flashmorph.hosts.parts import LAYER

_BUFFER = re.compile(r"(^|[._])inv_freq$")
_ON_THE_WAY = re.compile(r"norm|embed|^ln_")
"""A module beside the layers of this name works on the hidden states that go through them."""
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "module": "DataParallel or DeepSpeed",
    "base_model.model": "peft",
    "base_layer": "peft",
}
_HINTS = {
    r"lora_|\.base_layer\.|modules_to_save|ia3_|prompt_encoder": "an adapter that is not merged: merge it first",
    r"scale|zero_point|qweight|qzeros|g_idx|packed|absmax|quant|SCB|\.codes|nested": "of a quantised form: give the "
    "checkpoint it was made from",
    r"\.bias$": "config.json denies them: correct attention_bias or mlp_bias there",
}


@dataclass(frozen=True)
class Stock:
    """The weights that are read, by stored name, and `notices` about those that are not."""

    taken: dict[str, str]
    notices: tuple[str, ...]


def take_stock(model: PreTrainedModel, stored: Mapping[str, str], folder: Path, allow_unused: bool = False) -> Stock:
    """Follow the names in `folder`, `stored` with their dtypes as safetensors calls them, into an (empty) `model`.

    Weights of whole parts that the model does not have (prediction of several tokens, a vision tower) are reported.
    With `allow_unused`, so are weights of its own parts that would be refused.

    Raises:
        UserError: weights are missing, or named with a wrapper's prefix; a part that is used holds a weight that is
            not stored as floating-point numbers of 16 bits or more, or one that the model does not take; two stored
            weights go into one.
    """
    taken, filled, left = _follow(model, stored, folder)
    needed = model.state_dict().keys() - (model.all_tied_weights_keys or {}).keys()
    if missing := sorted(needed - filled):
        _refuse_wrapped(folder, missing, left)
        raise incomplete(folder, missing)
    used = {_part_of(name) for name in (*model.state_dict(), *taken)}
    inside = [name for name in left if _is_inside(name, used)]
    whole = sorted(set(left) - set(inside))
    notices = [ignored_adapter(folder)]
    notices += _refuse_dtypes(folder, {name: stored[name] for name in (*taken, *inside)}, allow_unused)
    notices += _refuse_names(folder, inside, type(model).__name__, allow_unused)
    if whole:
        notices.append(
            f"{folder} has {len(whole)} weights of parts that {type(model).__name__} does not have, {cut(whole[0])} "
            "first; they are left out"
        )
    return Stock(taken, tuple(filter(None, notices)))


def require_layers(config: PreTrainedConfig, stored: Iterable[str], folder: Path) -> None:
    """Refuse a configuration with more layers than the weights, before such a model is built.

    Raises:
        UserError: names both numbers.
    """
    numbers = {int(layer.group(1)) for name in stored if (layer := LAYER.match(name))}
    if numbers and (configured := getattr(config, "num_hidden_layers", 0)) > (stored_layers := max(numbers) + 1):
        raise UserError(
            f"{folder} lacks weights: config.json says num_hidden_layers {configured:,}, and there are "
            f"those of {stored_layers:,} layers"
        )


def incomplete(folder: Path, missing: list[str]) -> UserError:
    """That these weights are not in `folder`, in one sentence."""
    return UserError(f"{folder} lacks {len(missing)} weights, {cut(missing[0])} first: the checkpoint is incomplete")


def _follow(model: PreTrainedModel, stored: Iterable[str], folder: Path) -> tuple[dict[str, str], set[str], list[str]]:
    """Which weight of the model each stored one goes into, all that are filled, and the stored ones that are left.

    A weight that is split when it is loaded goes into several; the first stands for them.

    Raises:
        UserError: a weight is stored under two names that do not belong together.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names, prefix = model.state_dict(), model.base_model_prefix
    makers = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    taken: dict[str, str] = {}
    alone: dict[str, str] = {}
    joined: dict[str, str] = {}
    filled: set[str] = set()
    left = []
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, prefix, names)
        if target not in names and name in names:
            target, pattern = rename_source_key(name, [], [], prefix, names)
        if target in names:
            other = alone.get(target) or (joined.get(target) if pattern is None else None)
            if other:
                raise UserError(
                    f"{folder} stores {cut(target)} twice, as {cut(other)} and as {cut(name)}: delete the wrong one"
                )
            (alone if pattern is None else joined)[target] = name
            taken[name] = target
            targets = makers[pattern].target_patterns if pattern else [target]
            filled |= {target.replace(targets[0], each) for each in targets}
        elif not _BUFFER.search(name):
            left.append(name)
    return taken, filled, left


def _part_of(name: str) -> str:
    """The prefix of a part's names: a decoder layer, or a module outside of them."""
    layer = LAYER.match(name)
    return layer.group() if layer else name[: name.rfind(".") + 1]


def _is_inside(name: str, used: set[str]) -> bool:
    """Whether a weight belongs to one of these parts, or works on what goes from one to the next."""
    if name.startswith(tuple(part for part in used if part)):
        return True
    decoders = {part[: part.rfind("layers.")] for part in used if LAYER.match(part)}
    beside = [name.removeprefix(decoder) for decoder in decoders if name.startswith(decoder)]
    return any(rest.count(".") <= 1 and _ON_THE_WAY.search(rest) for rest in beside)


def _refuse_wrapped(folder: Path, missing: list[str], left: list[str]) -> None:
    """The notice about names with a wrapper's prefix.

    Raises:
        UserError: without prefixes, or behind one, the names are those that are missing.
    """
    wanted = set(missing)
    for name in left:
        plain, makers = name, []
        for wrapper, maker in _WRAPPERS.items():
            if (shorter := re.sub(rf"(^|\.){re.escape(wrapper)}\.", r"\1", plain)) != plain:
                plain, makers = shorter, [*makers, maker]
        end = next((part for part in _endings(plain) if part in wanted), None)
        if end and end != name:
            by = f"as {makers[0]} leaves them" if makers else "which no model of transformers has"
            how = "merge the adapter and save the model" if "peft" in makers else "save the model that is inside"
            raise UserError(
                f"the weights in {folder} have a wrapper's names, {by}: {cut(name)} in place of {cut(end)}; {how} with "
                "save_pretrained, and give that folder"
            )


def _endings(name: str) -> Iterable[str]:
    """The name, and what is left of it as more and more is taken from its front."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _refuse_dtypes(folder: Path, stored: Mapping[str, str], allowed: bool) -> list[str]:
    """A notice about weights that are not stored as numbers that can be computed with.

    Raises:
        UserError: there are some, and they are not `allowed`.
    """
    foreign = [name for name, dtype in stored.items() if dtype not in FLOATS]
    if not foreign:
        return []
    about = f"{folder} stores {len(foreign)} weights as {stored[foreign[0]]}, {cut(foreign[0])} first"
    if allowed:
        return [f"{about}: what is computed takes these as plain numbers, without any scale"]
    raise UserError(
        f"{about}, a quantised form: give the checkpoint it was made from (--allow-unused takes them as plain numbers)"
    )


def _refuse_names(folder: Path, inside: list[str], name: str, allowed: bool) -> list[str]:
    """A notice about weights of parts that are used, which the model does not take.

    Raises:
        UserError: there are some, and they are not `allowed`.
    """
    if not inside:
        return []
    finding = f"{folder} holds {len(inside)} weights that {name} does not take, {cut(inside[0])} first"
    if allowed:
        return [f"{finding}: what is computed leaves them out"]
    hint = next((f" ({text})" for pattern, text in _HINTS.items() if re.search(pattern, inside[0])), "")
    raise UserError(f"{finding}{hint}: what is computed would not be what is stored; --allow-unused leaves them out")
