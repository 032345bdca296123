"""Families that have been looked at and have no exact host, with the reason: docs/decisions/0011."""

from collections.abc import Mapping

_OLMO = "its norms stand behind attention and MLP; OLMo-Hybrid moves the MLP's to the front in a switched layer"
_GEMMA = "it has norms before and behind each block and GELU; no hybrid in transformers has both"

REFUSED: Mapping[str, str] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "ministral3": "it scales its queries with their position (llama_4_scaling_beta); no hybrid in transformers does",
    "olmo2": _OLMO,
    "olmo3": _OLMO,
}
