"""The configuration of a model whose key-value heads have different mixers.

This file travels with every checkpoint: it imports torch and transformers only.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

FORMAT = 1
"""Version of these files; another one in config.json belongs to other files."""
FULL = "full"


@strict
class FlashmorphConfig(Qwen3Config):
    """A Llama- or Qwen3-shaped decoder; `mixers[layer]` maps the name of each mixer to its key-value heads.

    `mixer_settings` has the settings of every mixer but `full`, by its name; `kind` among them is the class. Queries
    and keys are normalised if `qk_norm`; `attention_bias` is about queries, keys and values. `no_rope_layers` has a 0
    for each layer that does not rotate them. `layer_types` follows from `mixers`: `hybrid` is transformers' word for
    a layer that has states beside keys and values.

    Raises:
        ValueError: the files are of another format, or a layer's heads do not have one mixer each.
    """

    model_type = "flashmorph"

    mixers: list[dict[str, list[int]]] | None = None
    mixer_settings: dict[str, dict[str, Any]] | None = None
    qk_norm: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: list[int] | None = None
    own_format: int = FORMAT

    def __post_init__(self, **kwargs: Any):
        if self.own_format != FORMAT:
            raise ValueError(
                f"this checkpoint has format {self.own_format} of flashmorph's model files, and these are format "
                f"{FORMAT}: open it with the flashmorph that wrote it, or with its own files (trust_remote_code=True)"
            )
        heads = self.num_key_value_heads or self.num_attention_heads
        if self.mixers is None:
            self.mixers = [{FULL: list(range(heads))} for _ in range(self.num_hidden_layers)]
        self.mixer_settings = self.mixer_settings or {}
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers has {len(self.mixers)} layers, and the model has {self.num_hidden_layers}")
        for number, layer in enumerate(self.mixers):
            if sorted(head for its in layer.values() for head in its) != list(range(heads)):
                raise ValueError(f"mixers of layer {number}: each of the {heads} key-value heads has one; got {layer}")
            if unknown := [name for name in layer if name != FULL and name not in self.mixer_settings]:
                raise ValueError(f"mixers of layer {number}: mixer_settings has no {unknown[0]!r}")
        self.layer_types = ["full_attention" if set(layer) == {FULL} else "hybrid" for layer in self.mixers]
        super().__post_init__(**kwargs)


__all__ = ["FlashmorphConfig"]
