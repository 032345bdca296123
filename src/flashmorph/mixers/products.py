"""Operations and cache of attention and feed-forward, the same in all hosts; operations of a backward."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import PreTrainedConfig

from flashmorph.mixers.mixer import Products

STATE_BYTES = 4
"""Bytes of a number in a recurrent state, which transformers keeps in float32."""


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of a head; not every family's configuration states it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def number_bytes(config: PreTrainedConfig) -> int:
    """Bytes of a number in the configuration's dtype."""
    return torch.empty(0, dtype=cast(torch.dtype, config.dtype)).element_size()


def attention_cache_bytes(config: PreTrainedConfig, tokens: int) -> int:
    """Keys and values of `tokens`, in one layer."""
    return 2 * config.num_key_value_heads * head_dim_of(config) * tokens * number_bytes(config)


def attention_products(
    config: PreTrainedConfig, context: int, window: int | None = None, gated: bool = False
) -> list[Products]:
    """Attention over `context` tokens, through a `window` if there is one; `gated` has a gate row for each query row.

    Of the first tokens a window sees less, so kernels do `1 - window / (2 · context)` of its scores: one half where it
    is as long as the context.
    """
    width, heads, groups, head_dim = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim_of(config),
    )
    seen = context if window is None else min(context, window)
    of_scores = "context" if window is None else "min(context, window)"
    rows, gate, twice = (2 * heads, "gate, ", "2 · ") if gated else (heads, "", "")
    into = 2 * width * (rows + 2 * groups) * head_dim
    scores, scores_formula = 4 * seen * heads * head_dim, f"4 · {of_scores} · heads · head_dim"
    return [
        Products(f"q, {gate}k, v", "input", f"2 · hidden · ({twice}heads + 2 · kv_heads) · head_dim", into),
        Products("scores, values", "state", scores_formula, scores, 1 - seen / (2 * context), step=scores),
        Products("out", "weights", "2 · heads · head_dim · hidden", 2 * heads * head_dim * width),
    ]


def feed_forward_products(width: int, inner: int) -> list[Products]:
    """A gated feed-forward from `width` to `inner` and back."""
    return [
        Products("gate, up", "weights", "4 · hidden · intermediate", 4 * width * inner),
        Products("down", "weights", "2 · hidden · intermediate", 2 * width * inner),
    ]


def operations(
    products: Sequence[Products], forward: int = 1, weights: int = 0, inputs: int = 0
) -> tuple[float, float]:
    """Operations a token, all of them and those that kernels do.

    `forward` is how often they run forward; a backward follows if there are gradients for the `weights` (1) or for what
    goes in (`inputs`, 1): a product with weights takes one product for each of the two, any other product two.
    """
    back = {"input": weights + inputs, "weights": weights + 1, "state": 2}
    backward = weights or inputs
    whole = [(each, each.flops * (forward + (back[each.kind] if backward else 0))) for each in products]
    return sum(flops for _, flops in whole), sum(flops * each.causal for each, flops in whole)
