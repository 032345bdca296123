"""What a host is: a stock hybrid architecture that a teacher can be moved into without changing what it computes."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from flashmorph.hosts.serving import Engine
from flashmorph.mixers import LAYER_TYPES, Mixer, Products

FEED_FORWARD = "feed-forward"
"""The part of a decoder layer that is not its mixer."""
_LAYER = re.compile(r"model\.layers\.\d+\.")


class Host(Protocol):
    """One host architecture; with its mixers the only code that knows names of model types, modules and weights.

    `teachers` maps their `model_type`s to what they are in words; `mixers` maps the options of a layer to what a layer
    is then, in the order of `Space.options`. `settings` says in words what each setting of `config` does; `engines` run
    the checkpoints. What is written out here is the same in most hosts.
    """

    teachers: Mapping[str, str]
    settings: Mapping[str, str] = {}
    engines: tuple[Engine, ...]
    model_class: type[PreTrainedModel]
    mixers: Mapping[str, Mixer]

    @property
    def name(self) -> str:
        """The class, as `architectures` in config.json has it."""
        return self.model_class.__name__

    @property
    def model_type(self) -> str:
        """The class's `model_type`."""
        return self.model_class.config_class.model_type  # type: ignore[union-attr]

    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse a teacher that has no exact counterpart here.

        Raises:
            UserError: names the part that does not fit.
        """
        ...

    def config(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """The host's configuration for this teacher, with every layer full.

        Further parameters, with defaults, are settings of the host: `host.<name>` in a recipe.

        Raises:
            UserError: a setting that this teacher does not fit.
        """
        ...

    def state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host's weights, all layers full, computed from the teacher's in `state`.

        `state` holds any number of whole decoder layers, and any of the weights outside of them: a checkpoint that does
        not fit into memory moves layer by layer.
        """
        ...

    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """What a layer does for each token beside its mixer; of experts those that a token goes through."""
        ...

    def with_plan(self, config: PreTrainedConfig, options: Sequence[str]) -> PreTrainedConfig:
        """A copy of the host's configuration whose layer l is `options[l]`."""
        config = copy.deepcopy(config)
        config.layer_types = [LAYER_TYPES[option] for option in options]
        return config

    def slot(self, option: str) -> str:
        """The attribute of a decoder layer that holds the mixer of this option."""
        return "self_attn"

    def serialise(self, values: dict[str, Any]) -> dict[str, Any]:
        """What config.json shall say, given what transformers writes: some engines read other words."""
        return values


def layer_prefixes(names: Iterable[str]) -> list[str]:
    """What the names of each decoder layer's weights begin with, `model.layers.3.`, of the layers among `names`."""
    found = (_LAYER.match(name) for name in names)
    return list(dict.fromkeys(match.group() for match in found if match))
