"""The cache of a layer whose heads have different mixers: growing keys and values of its full heads, and states.

This file travels with every checkpoint: it imports torch and transformers only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .mixer_flashmorph import State


class FlashmorphCacheLayer(DynamicLayer):
    """Keys and values of the full heads, as in the layer that it extends, and the `states` of other mixers by name.

    `seen` counts tokens: a layer without a full head has no keys to count.
    """

    is_croppable = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.seen = 0
        self.states: dict[str, State] = {}

    def get_seq_length(self) -> int:
        """Tokens that went through the layer."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.states = 0, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a state cannot be taken back.

        Raises:
            ValueError: any token is to be removed.
        """
        if tokens_to_remove:
            raise ValueError("the state of a mixer cannot give tokens back: this cache cannot be cropped")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take these rows, for beam search."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._each(lambda tensor: tensor[indices.to(tensor.device), ...])

    def _each(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        self.states = {
            name: {key: change(tensor) for key, tensor in state.items()} for name, state in self.states.items()
        }


def own_layers(cache: Cache, hybrid: Sequence[bool]) -> None:
    """Put our layers into `cache` where `hybrid[layer]`: generate() makes transformers' own, whose states do not grow.

    Raises:
        ValueError: the cache is static, quantised or offloaded, or has tokens already that our layers have not seen.
    """
    if any(hybrid) and getattr(cache, "offloading", False):
        raise ValueError("a flashmorph model needs its cache on its own device; this one is offloaded to the CPU")
    for number, ours in enumerate(hybrid):
        if number == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number]
        if not isinstance(layer, DynamicLayer) or hasattr(layer, "_quantized_keys") or hasattr(layer, "nbits"):
            raise ValueError(f"a flashmorph model needs a dynamic cache; this one has a {type(layer).__name__}")
        if ours and type(layer).__name__ != FlashmorphCacheLayer.__name__:
            if layer.get_seq_length():
                raise ValueError("this cache has tokens of another model: its states are missing")
            cache.layers[number] = FlashmorphCacheLayer()
