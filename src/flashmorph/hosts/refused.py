"""Families that have been looked at and have no exact host, with the reason: docs/decisions/0011; and other hosts of
teachers that one refuses."""

from collections.abc import Iterable, Mapping

from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.hosts.host import Host

_OLMO = "its norms stand behind attention and MLP; OLMo-Hybrid moves the MLP's to the front in a switched layer"
_GEMMA = "it has norms before and behind each block and GELU; no hybrid in transformers has both"

REFUSED: Mapping[str, str] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "ministral3": "it scales its queries with their position (llama_4_scaling_beta); no hybrid in transformers does",
    "olmo2": _OLMO,
    "olmo3": _OLMO,
}


def with_other_hosts(refusal: UserError, config: PreTrainedConfig, others: Iterable[tuple[str, Host]]) -> UserError:
    """The refusal of one host, and which of the `others`, by the option that asks for them, take this teacher."""
    options = [f"with {option} it moves into {host.name}" for option, host in others if _takes(host, config)]
    return UserError("; ".join([str(refusal), ", ".join(options)])) if options else refusal


def _takes(host: Host, config: PreTrainedConfig) -> bool:
    if config.model_type not in host.teachers:
        return False
    try:
        host.check(config)
    except UserError:
        return False
    return True
