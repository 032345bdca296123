"""The parts of a causal language model under transformers' names, which all hosts and teachers share."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.", "model.norm.", "lm_head."
"""Prefixes of the names of weights outside of the decoder layers."""
LAYER = re.compile(r"(?:.*?\.)?layers\.(\d{1,6})(?:\.|$)")
"""Matches the name of a decoder layer, or of what is inside of one, up to the layer's number, its only group."""


def layer_prefix(number: int) -> str:
    """The prefix of the names of a decoder layer's weights."""
    return f"model.layers.{number}."


def decoder_of(model: PreTrainedModel) -> Any:
    """The model without its head: from token ids to last hidden states."""
    return model.get_decoder()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    return decoder_of(model).layers


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    """The norm between the last decoder layer and the head."""
    return decoder_of(model).norm


def input_norm_of(layer: Any) -> nn.Module:
    """The norm in front of a decoder layer's mixer."""
    return layer.input_layernorm


@contextmanager
def only_layers(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within this, the decoder has these layers only and no final norm."""
    decoder = decoder_of(model)
    all_layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = nn.ModuleList(layers), nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = all_layers, norm
