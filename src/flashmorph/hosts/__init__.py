"""Architectures that teachers are moved into: stock hybrids, stock classes with windows, and our own type by head.

A family of an existing host is one entry in its `teachers`; a new host is one file with one class and its line below.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.files import digest_of
from flashmorph.hosts.granite_hybrid import GraniteHybridHost
from flashmorph.hosts.host import FEED_FORWARD, Host
from flashmorph.hosts.own import OWN, OwnHost
from flashmorph.hosts.qwen3_5 import Qwen35Host
from flashmorph.hosts.qwen3_5_moe import Qwen35MoeHost
from flashmorph.hosts.refused import REFUSED, with_other_hosts
from flashmorph.hosts.window import WINDOW_HOSTS
from flashmorph.inputs.settings import resolve
from flashmorph.mixers import Products
from flashmorph.mixers.kernels import dispatch_by_device
from flashmorph.plan import Budget, Space
from flashmorph.records import SettingValues

HOSTS: tuple[Host, ...] = (Qwen35Host(), Qwen35MoeHost(), GraniteHybridHost())
"""Stock hybrids, one of which takes a teacher unless windows or mixers are asked for."""
ALL_HOSTS: tuple[Host, ...] = (*HOSTS, *WINDOW_HOSTS, OWN)
_ASKED_FOR = (*(("--window TOKENS", host) for host in WINDOW_HOSTS), ("--mixers full,window", OWN))
"""Hosts beside `HOSTS`, and the option that asks for each."""
HOST_TYPES = frozenset(host.model_type for host in ALL_HOSTS)
"""The `model_type` of every host."""
_TIMELESS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
"""Entries of a configuration that the time of a token does not depend on."""
CACHE_CONTEXTS = (512, 8192, 131072)
"""Context lengths in tokens at which results give the size of the cache."""


def host_for(config: PreTrainedConfig, settings: Mapping[str, Any] | None = None) -> Host:
    """The host that takes teachers of this configuration: one of the `WINDOW_HOSTS` where a `window` is set, our own
    type where `mixers` are.

    Raises:
        UserError: no host takes its architecture, or a part of it has no exact counterpart.
    """
    given = settings or {}
    hosts = (OwnHost.asked_for(given),) if "mixers" in given else WINDOW_HOSTS if "window" in given else HOSTS
    for host in hosts:
        if config.model_type in host.teachers:
            try:
                host.check(config)
            except UserError as refusal:
                raise with_other_hosts(refusal, config, _ASKED_FOR if hosts is HOSTS else ()) from None
            return host
    known = ", ".join(sorted(family for host in hosts for family in host.teachers))
    if "mixers" in given:
        raise UserError(f"teachers of type {config.model_type!r} cannot be switched by head; these can: {known}")
    if hosts is WINDOW_HOSTS:
        raise UserError(f"teachers of type {config.model_type!r} have no host for windows; these have one: {known}")
    reason = f" ({REFUSED[config.model_type]})" if config.model_type in REFUSED else ""
    raise UserError(f"teachers of type {config.model_type!r} have no exact host{reason}; these have one: {known}")


def takes_with_windows(config: PreTrainedConfig) -> bool:
    """Whether some host takes this family of teachers when a window or mixers are set, whatever the others do."""
    return any(config.model_type in host.teachers for host in (*WINDOW_HOSTS, OWN))


def host_settings(host: Host, given: Mapping[str, Any] | None = None) -> SettingValues:
    """The host's settings: its defaults, replaced by what is `given`, as its `config`'s signature wants them.

    Raises:
        UserError: names a setting that the host does not have, or one that is of a wrong type or out of its range.
    """
    return resolve(host.config, given or {}, ("teacher",), host.name, "host.")


def configure(teacher: PreTrainedConfig, settings: Mapping[str, Any] | None = None) -> tuple[Host, PreTrainedConfig]:
    """The host that takes teachers of this configuration, and its own configuration with every layer full.

    Raises:
        UserError: see `host_for` and `host_settings`; or the teacher does not fit a setting.
    """
    host = host_for(teacher, settings)
    return host, cast(Any, host).config(teacher, **host_settings(host, settings))


def host_of(config: PreTrainedConfig) -> Host:
    """The host whose own configuration this is.

    Raises:
        UserError: it is no host's.
    """
    if config.model_type == OWN.model_type:
        return OwnHost.of(config)
    for host in (*HOSTS, *WINDOW_HOSTS):
        if config.model_type == host.model_type:
            return host
    raise UserError(f"{config.model_type!r} is no host of flashmorph's; run `flashmorph transplant` first")


def require_known(config: PreTrainedConfig, name: str) -> None:
    """Refuse models that are neither a teacher nor in a host's class.

    Raises:
        UserError: names the kinds that are known.
    """
    teachers = sorted(family for host in HOSTS for family in host.teachers)
    made = sorted(host.model_type for host in (*HOSTS, OWN))
    if config.model_type not in (*teachers, *made):
        raise UserError(
            f"{name} is of type {config.model_type!r}: give a teacher ({', '.join(teachers)}) or what flashmorph made "
            f"of one ({', '.join(made)})"
        )


def cache_bytes(config: PreTrainedConfig, context: int) -> int:
    """Bytes of cache of one sequence of `context` tokens, of a host's model or of a teacher's.

    Raises:
        UserError: the configuration is neither.
    """
    return sum(cache_by_layer(config, context))


def cache_by_layer(config: PreTrainedConfig, context: int) -> list[int]:
    """`cache_bytes`, layer by layer."""
    host, config, layers = _layers(config)
    return [
        sum(host.mixers[option].cache_bytes(config, context) for option in options) // len(options)
        for options in layers
    ]


def mixing_operations(config: PreTrainedConfig, context: int) -> int:
    """Multiplications and additions of all mixers for one token that sees `context` tokens; see `Products.step`.

    Raises:
        UserError: the configuration is neither a host's nor a teacher's.
    """
    host, config, layers = _layers(config)
    return sum(
        sum(each.step for option in options for each in host.mixers[option].products(config, context)) // len(options)
        for options in layers
    )


def layer_products(host: Host, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
    """The matrix products of one decoder layer for each token: of the mixer of an option, or of `FEED_FORWARD`."""
    return host.feed_forward(config) if part == FEED_FORWARD else host.mixers[part].products(config, context)


def misreads_tokenizer(model_type: str) -> bool:
    """Whether `AutoTokenizer` takes a class of its own for a host of this type, whatever the tokenizer's files say.

    For Qwen3-MoE's it is Qwen3.5's, which splits words at combining marks otherwise.
    """
    return model_type == "qwen3_5_moe_text"


def with_branches_to_train(host: Host) -> bool:
    """Whether any of its mixers has weights of its own, which have to be aligned."""
    return any(mixer.trainable for mixer in host.mixers.values())


def supports_varlen(host: Host, device: torch.device) -> bool:
    """Whether all its mixers keep documents in one row apart on this device; where not, rows are cut at the boundaries.

    The boundary arguments are those of `isolation.marked`.
    """
    return all(mixer.supports_varlen(device) for mixer in host.mixers.values())


def use_kernels(model_type: str) -> None:
    """Make transformers' class of this type, where it is a host's, choose kernels by the device of its tensors.

    It changes functions of transformers' modelling modules, once in a process, for all models of the class.
    """
    for host in HOSTS:
        if host.model_type == model_type:
            for mixer in host.mixers.values():
                if mixer.kernels:
                    dispatch_by_device(mixer.kernels)


def _layers(config: PreTrainedConfig) -> tuple[Host, PreTrainedConfig, list[tuple[str, ...]]]:
    """The host, its configuration and the options of each layer."""
    if config.model_type not in HOST_TYPES:
        dtype, (_, config) = config.dtype, configure(config)
        config.dtype = dtype
    host = host_of(config)
    return host, config, host.options(config)


def layer_space(host: Host, config: PreTrainedConfig, budget: Budget) -> Space:
    """The space of plans for a host's configuration, its cost in the budget's resource.

    Its groups are key-value heads where the budget counts them, or bytes or time in a host that takes heads one by one.

    Raises:
        UserError: the budget counts heads, and the host takes whole layers; or it is one of time, and has no costs or
            those of another model.
    """
    options, layers = tuple(host.mixers), config.num_hidden_layers
    if budget.counts_heads and not host.by_head:
        raise UserError(
            f"budget {budget} counts heads, and {host.name} takes whole layers; "
            f"--mixers {','.join(list(OWN.mixers)[:2])} takes heads"
        )
    heads = config.num_key_value_heads if budget.counts_heads or (budget.is_amount and host.by_head) else 0
    space = Space.of_heads(layers, heads, options) if heads else Space.of_layers(layers, options)
    if not budget.is_amount:
        return space
    if budget.is_time:
        if not budget.costs:
            raise UserError(_without_costs(budget))
        return Space(space.groups, space.options, budget.costs.table(space.groups, space.options))
    row = [mixer.cache_bytes(config, budget.context or 0) / max(1, heads) for mixer in host.mixers.values()]
    return Space(space.groups, space.options, np.tile(row, (len(space.groups), 1)))


def _without_costs(budget: Budget) -> str:
    return (
        f"budget {budget} needs the time of each layer: `flashmorph bench TEACHER --lengths {budget.context} --costs "
        f"costs.json` measures it here, `flashmorph estimate TEACHER --gpu h100 --contexts {budget.context} --costs "
        "costs.json` estimates it for a GPU; then give --set select.costs=costs.json"
    )


def shape_of(host: Host, config: PreTrainedConfig) -> str:
    """The digest of what the time of a host's model depends on: its configuration with every layer full, and mixers.

    Names of files, versions, special tokens and the dtype are left out.
    """
    values = {name: value for name, value in config.to_diff_dict().items() if name not in _TIMELESS}
    return digest_of([host.name, list(host.mixers), values])


def cache_by_context(config: PreTrainedConfig) -> dict[str, int]:
    """`cache_bytes` by context, as text, as in results.json: at contexts of `CACHE_CONTEXTS` that the model has, and at
    its limit."""
    first, *longer = CACHE_CONTEXTS
    limit = max(first, getattr(config, "max_position_embeddings", None) or longer[-1])
    contexts = sorted({first, *(context for context in longer if context <= limit), min(limit, longer[-1])})
    return {str(context): cache_bytes(config, context) for context in contexts}


__all__ = [
    "ALL_HOSTS",
    "FEED_FORWARD",
    "HOSTS",
    "HOST_TYPES",
    "OWN",
    "WINDOW_HOSTS",
    "Host",
    "cache_by_context",
    "cache_by_layer",
    "cache_bytes",
    "configure",
    "host_for",
    "host_of",
    "host_settings",
    "layer_products",
    "layer_space",
    "mixing_operations",
    "require_known",
    "shape_of",
    "supports_varlen",
    "takes_with_windows",
    "use_kernels",
    "with_branches_to_train",
]
