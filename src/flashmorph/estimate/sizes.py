"""Parameters of a teacher, its host and its hybrids, counted on models without memory: nothing is loaded.

What PyTorch's reference of a mixer keeps for a backward is counted as well, on tensors without memory.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig

from flashmorph.hosts import FEED_FORWARD, Host, use_kernels
from flashmorph.hosts.build import without_weights
from flashmorph.hosts.parts import layers_of
from flashmorph.mixers import Mixer
from flashmorph.mixers.kernels import kernel_runs
from flashmorph.plan import FULL

_KEPT_TOKENS = 256


class Part(NamedTuple):
    """One part of a decoder layer: its parameters, and the inputs and outputs of its linear maps in numbers a token.

    `expert_widths` are those of the experts that a token goes through, counted apart; `idle` are parameters of experts
    that it does not go through. `kept` are bytes a token that a mixer keeps for its backward, in float32 and in
    bfloat16, where no kernel runs.
    """

    parameters: int
    widths: int
    expert_widths: int = 0
    idle: int = 0
    kept: tuple[float, float] | None = None

    def beside(self, other: "Part") -> "Part":
        """Both parts of one layer together."""
        return Part(self.parameters + other.parameters, self.widths + other.widths)

    def kept_bytes(self, bf16: bool) -> float:
        """Bytes a token that it keeps for its backward, its products in float32 or bfloat16."""
        if self.kept:
            return self.kept[bf16]
        # transformers runs routed experts in the dtype of their weights, whatever autocast says.
        return (2 if bf16 else 4) * self.widths + 4 * self.expert_widths


@dataclass(frozen=True)
class Sizes:
    """Parameters of the teacher, of its host with every layer full, of one layer's parts (each option's mixer and what
    is beside them), and of what stands beside one attention as its branches."""

    teacher: int
    host: int
    layers: int
    parts: Mapping[str, Part]
    beside: int

    def hybrid(self, option: str, num_full: float) -> int:
        """Parameters of the model with `num_full` full layers, all others `option`."""
        return self.host + round(
            (self.layers - num_full) * (self.parts[option].parameters - self.parts[FULL].parameters)
        )

    @property
    def branches(self) -> int:
        """Parameters of the branches of all layers."""
        return self.layers * self.beside

    @property
    def idle(self) -> int:
        """Parameters that a token does not go through."""
        return self.layers * self.parts[FEED_FORWARD].idle


def count_sizes(
    host: Host, teacher: PreTrainedConfig, config: PreTrainedConfig, device: torch.device | None = None
) -> Sizes:
    """Sizes for a teacher's configuration and its host's, every layer full.

    Counted on models of one layer: a teacher that has a host has layers that are alike. Without a `device` kernels are
    taken to run.

    Raises:
        UserError: no model can be made of the configuration.
    """
    own: Any = without_weights(_of_one_layer(teacher), with_buffers=False)
    model: Any = without_weights(_of_one_layer(config), host.model_class, with_buffers=False)
    with torch.device("meta"):
        layer = layers_of(model)[0]
        attention = getattr(layer, host.slot(FULL))
        others = {option: mixer for option, mixer in host.mixers.items() if option != FULL}
        branches = {option: mixer.build(config, 0, attention) for option, mixer in others.items()}
    chosen = getattr(config, "num_experts_per_tok", 0)
    parts = {FULL: _part(attention, chosen)}
    for option, branch in branches.items():
        # A branch without weights of its own runs on those of the attention.
        mixer = others[option]
        parts[option] = _part(branch, chosen)
        if mixer.borrows:
            parts[option] = parts[option].beside(parts[FULL])
        if device and mixer.kernels and not kernel_runs(mixer.kernels, device):
            use_kernels(host.model_type)
            kept = _kept(mixer, config, attention, False), _kept(mixer, config, attention, True)
            parts[option] = parts[option]._replace(kept=kept)
    whole = _part(layer, chosen)
    full = parts[FULL]
    parts[FEED_FORWARD] = Part(
        whole.parameters - full.parameters,
        whole.widths - full.widths,
        whole.expert_widths - full.expert_widths,
        whole.idle - full.idle,
    )
    beside = sum(_parameters(branch) for branch in branches.values())
    layers = config.num_hidden_layers
    teachers, hosts = (_parameters(each) + (layers - 1) * _parameters(layers_of(each)[0]) for each in (own, model))
    return Sizes(teachers, hosts, layers, parts, beside)


def _kept(mixer: Mixer, config: PreTrainedConfig, attention: nn.Module, bf16: bool) -> float:
    """Bytes a token that a mixer keeps for its backward; weights in the dtype of products are none of them."""
    with FakeTensorMode():
        module = mixer.build(config, 0, attention)
        own = {weight.untyped_storage()._cdata for weight in module.parameters()}
        sizes = []
        for tokens in (_KEPT_TOKENS, 2 * _KEPT_TOKENS):
            stored: dict[int, torch.UntypedStorage] = {}

            def keep(tensor: torch.Tensor, stored: dict[int, torch.UntypedStorage] = stored) -> torch.Tensor:
                storage = tensor.untyped_storage()
                stored[storage._cdata] = storage
                return tensor

            hidden = torch.empty(1, tokens, config.hidden_size, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, bf16), saved_tensors_hooks(keep, lambda tensor: tensor):
                mixer.run(module, hidden, {})
            sizes.append(sum(storage.nbytes() for data, storage in stored.items() if data not in own))
    return (sizes[1] - sizes[0]) / _KEPT_TOKENS


def _of_one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if types := getattr(config, "layer_types", None):
        config.layer_types = types[:1]
    return config


def _parameters(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(weight.numel() for weight in module.parameters())


def _part(module: nn.Module, chosen: int) -> Part:
    """A matrix is a linear map; three dimensions are experts, of which a token goes through `chosen`."""
    layers = [each for each in module.modules() if not isinstance(each, nn.Conv1d)]
    weights = [weight for each in layers for weight in each.parameters(recurse=False)]
    experts = [weight for weight in weights if weight.ndim == 3]
    widths = sum(sum(weight.shape) for weight in weights if weight.ndim == 2)
    through = sum(sum(weight.shape[1:]) for weight in experts)
    if experts:
        # A gated activation narrows what goes on from the first product to the last, and keeps both of its factors.
        through += experts[0].shape[1] - experts[-1].shape[2]
    idle = sum(weight[0].numel() * (len(weight) - chosen) for weight in experts)
    return Part(_parameters(module), widths, chosen * through, idle)
