"""Stock hybrid architectures that teachers are moved into, one file each.

A new family of teachers is one file with one class and one line in `HOSTS`.
"""

from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.hosts.host import LINEAR, Host
from flashmorph.hosts.qwen3_5 import Qwen35Host

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


def require_known(config: PreTrainedConfig, name: str) -> None:
    """Refuse models that are neither a teacher nor in a host's class.

    Raises:
        UserError: names the kinds that are known.
    """
    teachers = sorted(family for host in HOSTS for family in host.teachers)
    made = sorted(host.model_type for host in HOSTS)
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
    host, config, options = _layers(config)
    return [host.cache_bytes(config, option, context) for option in options]


def mixing_operations(config: PreTrainedConfig, context: int) -> int:
    """Multiplications and additions of all mixers for one token that sees `context` tokens; see `Host`.

    Raises:
        UserError: the configuration is neither a host's nor a teacher's.
    """
    host, config, options = _layers(config)
    return sum(host.mixing_operations(config, option, context) for option in options)


def _layers(config: PreTrainedConfig) -> tuple[Host, PreTrainedConfig, list[str]]:
    """The host, its configuration and the option of each layer."""
    if any(config.model_type in host.teachers for host in HOSTS):
        dtype, config = config.dtype, host_for(config).host_config(config)
        config.dtype = dtype
    host = host_of(config)
    options = {word: option for option, word in host.options.items()}
    return host, config, [options[word] for word in config.layer_types]


def cache_by_context(config: PreTrainedConfig) -> dict[str, int]:
    """`cache_bytes` at each of `CACHE_CONTEXTS`, the context as text, as it stands in results.json."""
    return {str(context): cache_bytes(config, context) for context in CACHE_CONTEXTS}


__all__ = [
    "HOSTS",
    "LINEAR",
    "Host",
    "cache_by_context",
    "cache_by_layer",
    "cache_bytes",
    "host_for",
    "host_of",
    "mixing_operations",
    "require_known",
]
