"""Stock hybrid architectures that teachers are moved into, one file each.

A new family of teachers is one file with one class and one line in `HOSTS`.
"""

import numpy as np
from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.hosts.host import FEED_FORWARD, LINEAR, Host, Products
from flashmorph.hosts.qwen3_5 import Qwen35Host
from flashmorph.plan import FULL, Budget, Space

HOSTS: tuple[Host, ...] = (Qwen35Host(),)
CACHE_CONTEXTS = (512, 8192, 131072)
"""Context lengths in tokens at which results give the size of the cache."""


def host_for(config: PreTrainedConfig) -> Host:
    """The host that takes teachers of this configuration.

    Raises:
        UserError: no host takes its architecture, or a part of it has no exact counterpart.
    """
    for host in HOSTS:
        if config.model_type in host.teachers:
            host.check(config)
            return host
    known = ", ".join(sorted(family for host in HOSTS for family in host.teachers))
    raise UserError(f"teachers of type {config.model_type!r} have no exact host; these have one: {known}")


def host_of(config: PreTrainedConfig) -> Host:
    """The host whose own configuration this is.

    Raises:
        UserError: it is no host's.
    """
    for host in HOSTS:
        if config.model_type == host.model_type:
            return host
    raise UserError(f"{config.model_type!r} is no host of flashmorph's; run `flashmorph transplant` first")


def cache_bytes(config: PreTrainedConfig, context: int) -> int:
    """Bytes of cache of one sequence of `context` tokens, of a host's model or of a teacher's.

    Raises:
        UserError: the configuration is neither.
    """
    if any(config.model_type in host.teachers for host in HOSTS):
        config = host_for(config).host_config(config)
    host = host_of(config)
    options = {word: option for option, word in host.options.items()}
    return sum(host.cache_bytes(config, options[word], context) for word in config.layer_types)


def layer_space(
    host: Host, config: PreTrainedConfig, budget: Budget, options: tuple[str, ...] = (FULL, LINEAR)
) -> Space:
    """The space of plans for a host's configuration, its cost in the budget's resource."""
    space = Space.of_layers(config.num_hidden_layers, options)
    if budget.resource != "kv":
        return space
    row = [float(host.cache_bytes(config, option, budget.context or 0)) for option in options]
    return Space(space.groups, space.options, np.tile(row, (len(space.groups), 1)))


def cache_by_context(config: PreTrainedConfig) -> dict[str, int]:
    """`cache_bytes` at each of `CACHE_CONTEXTS`, the context as text, as it stands in results.json."""
    return {str(context): cache_bytes(config, context) for context in CACHE_CONTEXTS}


__all__ = [
    "FEED_FORWARD",
    "HOSTS",
    "LINEAR",
    "Host",
    "Products",
    "cache_by_context",
    "cache_bytes",
    "host_for",
    "host_of",
    "layer_space",
]
