"""Parameters of a teacher, its host and its hybrids, counted on models without memory: nothing is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flashmorph.hosts import FEED_FORWARD, Host
from flashmorph.plan import FULL


class Part(NamedTuple):
    """One part of a decoder layer: its parameters, and the inputs and outputs of its linear maps in numbers a token."""

    parameters: int
    widths: int


@dataclass(frozen=True)
class Sizes:
    """Parameters of the teacher, of its host with every layer full, and of one layer's parts (each option's mixer and
    what is beside them)."""

    teacher: int
    host: int
    layers: int
    parts: Mapping[str, Part]

    def hybrid(self, option: str, num_full: int) -> int:
        """Parameters of the model with `num_full` full layers, all others `option`."""
        return self.host + (self.layers - num_full) * (self.parts[option].parameters - self.parts[FULL].parameters)

    def branches(self, option: str) -> int:
        """Parameters of one branch for each layer."""
        return self.layers * self.parts[option].parameters


def count_sizes(host: Host, teacher: PreTrainedConfig, config: PreTrainedConfig) -> Sizes:
    """Sizes for a teacher's configuration and its host's, every layer full."""
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(teacher)
        model: Any = host.model_class(cast(Any, config))
        branches = {option: host.make_branch(config, 0, option) for option in host.options if option != FULL}
    layer = model.model.layers[0]
    attention = getattr(layer, host.attention_name(FULL))
    parts = {option: _part(module) for option, module in {FULL: attention, **branches}.items()}
    whole = _part(layer)
    parts[FEED_FORWARD] = Part(whole.parameters - parts[FULL].parameters, whole.widths - parts[FULL].widths)
    return Sizes(_parameters(own), _parameters(model), len(model.model.layers), parts)


def _parameters(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(weight.numel() for weight in module.parameters())


def _part(module: nn.Module) -> Part:
    maps = [each for each in module.modules() if isinstance(each, nn.Linear)]
    return Part(_parameters(module), sum(each.in_features + each.out_features for each in maps))
