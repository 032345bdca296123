"""`Host`: an architecture into which a teacher is transplanted without changing its outputs."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from flashmorph.hosts.parts import LAYER
from flashmorph.hosts.serving import Engine
from flashmorph.mixers import LAYER_TYPES, Mixer, Products
from flashmorph.plan import FULL

FEED_FORWARD = "feed-forward"
"""The part of a decoder layer that is not its mixer."""


class Host(ABC):
    """One host architecture; with its mixers the only code that knows names of model types, modules and weights.

    `teachers` maps their `model_type`s to what they are in words; `mixers` maps the options of a layer to what a layer
    is then, in the order of `Space.options`. `settings` describes each setting of `config`; `engines` run
    the checkpoints. `by_head`: key-value heads of one layer may have different options. `travelling` are files of code
    that belong to every checkpoint. What is written out here is the same in most hosts.
    """

    teachers: Mapping[str, str]
    settings: Mapping[str, str] = {}
    engines: tuple[Engine, ...]
    model_class: type[PreTrainedModel]
    mixers: Mapping[str, Mixer]
    by_head: bool = False
    travelling: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The class, as `architectures` in config.json has it."""
        return self.model_class.__name__

    @property
    def model_type(self) -> str:
        """The class's `model_type`."""
        return self.model_class.config_class.model_type  # type: ignore[union-attr]

    @abstractmethod
    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse a teacher that has no exact counterpart here.

        Raises:
            UserError: names the part that does not fit.
        """
        ...

    @abstractmethod
    def config(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """The host's configuration for this teacher, with every layer full.

        Further parameters, with defaults, are settings of the host: `host.<name>` in a recipe.

        Raises:
            UserError: a setting that this teacher does not fit.
        """
        ...

    @abstractmethod
    def state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host's weights, all layers full, computed from the teacher's in `state`.

        `state` holds any number of whole decoder layers, and any of the weights outside of them: a checkpoint that does
        not fit into memory moves layer by layer.
        """
        ...

    @abstractmethod
    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """The matrix products of a layer beside its mixer, for each token; of experts, those that are active."""
        ...

    def with_plan(self, config: PreTrainedConfig, options: Sequence[str]) -> PreTrainedConfig:
        """A copy of the host's configuration whose group g is `options[g]`: layers, or all their heads."""
        config = copy.deepcopy(config)
        config.layer_types = [LAYER_TYPES[option] for option in options]
        return config

    def options(self, config: PreTrainedConfig) -> list[tuple[str, ...]]:
        """The options of each layer: one, or one for each key-value head."""
        options = {LAYER_TYPES[option]: option for option in self.mixers}
        return [(options[word],) for word in config.layer_types]

    def layer_state(
        self, options: Sequence[str], states: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The weights of a layer's mixer under their names in a decoder layer, given the `options` of its groups.

        `states` has the weights of every branch; one that is not trainable runs on those of the attention.
        """
        (option,) = options
        own = states[option] if self.mixers[option].trainable else states[FULL]
        return {f"{self.slot(option)}.{name}": weight for name, weight in own.items()}

    def slot(self, option: str) -> str:
        """The attribute of a decoder layer that holds the mixer of this option."""
        return "self_attn"

    def serialise(self, values: dict[str, Any]) -> dict[str, Any]:
        """The content of config.json, from what transformers writes: some engines read other fields."""
        return values


def layer_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes `model.layers.3.` of the decoder layers whose weights are among `names`."""
    matches = (LAYER.match(name) for name in names)
    return list(dict.fromkeys(match.group() for match in matches if match))


def split_joint(state: dict[str, torch.Tensor], attention: str, key_rows: int) -> None:
    """Replace a joint projection of queries, keys and values, where `attention` (a prefix) has one, by three."""
    if (name := f"{attention}qkv_proj.weight") in state:
        joint = state.pop(name)
        parts = joint.split([len(joint) - 2 * key_rows, key_rows, key_rows])
        state |= {f"{attention}{each}_proj.weight": part for each, part in zip("qkv", parts, strict=True)}
