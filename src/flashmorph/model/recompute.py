"""Layers that run again in the backward (activation checkpointing), where the gates' gradient would keep too much.

What a layer has given is the same both times, to the last bit, and so is the gradient.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

KEPT_BYTES = 2**30
"""Bytes of activations that a forward may keep for the gradient of the gates; beyond that, layers are recomputed."""
_KEPT_FOR_EACH_CHANNEL = 100
"""Bytes that all branches and the feed-forward of a layer keep of a token, over its width: 83 in bfloat16 and 140 in
float32 for the shape of Qwen3-1.7B, counted as in `estimate/memory.py`."""


def recomputes(config: PreTrainedConfig, tokens: int) -> bool:
    """Whether layers run again for the gradient of the gates, where `tokens` run at once."""
    return tokens * config.num_hidden_layers * config.hidden_size * _KEPT_FOR_EACH_CHANNEL > KEPT_BYTES


@contextmanager
def recomputed(decoder_layers: Iterable[nn.Module]) -> Iterator[None]:
    """Of each decoder layer that runs inside this context keep the inputs alone; the backward computes the rest again.

    Around `forward`, not around the call: hooks, such as those that gather a sharded layer, stay outside.
    """
    layers = list(decoder_layers)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
