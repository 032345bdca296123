"""What a host is: a stock hybrid architecture that a teacher can be moved into without changing what it computes."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LINEAR = "linear"
FEED_FORWARD = "feed-forward"
"""The part of a decoder layer that is not its mixer, for `Host.flops_per_token`."""


class Products(NamedTuple):
    """Matrix products that one part of a decoder layer does for each token; a multiply-add counts as two.

    `kind` says what a backward adds to them: `input` multiplies the part's own input by weights, `weights` something
    computed by weights, `state` two computed things; `scores` is a `state` of which causal attention needs one half.
    `formula` is how `flops` came about, in the names of the configuration.
    """

    name: str
    kind: Literal["input", "weights", "state", "scores"]
    formula: str
    flops: float


class Host(Protocol):
    """One host architecture; the only place that knows names of model types, modules and weights.

    `options` maps the options of a layer to the host's `layer_types` words; `serves` names what runs its checkpoints.
    """

    name: str
    teachers: tuple[str, ...]
    options: Mapping[str, str]
    serves: str
    model_class: type[PreTrainedModel]
    model_type: str

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a teacher that has no exact counterpart here.

        Raises:
            UserError: names the part that does not fit.
        """
        ...

    def host_config(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """The host's configuration for this teacher, with every layer full."""
        ...

    def host_state(self, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The host's weights, all layers full, computed from the teacher's."""
        ...

    def with_layer_types(self, config: PreTrainedConfig, options: list[str]) -> PreTrainedConfig:
        """A copy of the host's configuration whose layer l is `options[l]`."""
        ...

    def attention_name(self, option: str) -> str:
        """The attribute of a decoder layer that holds the mixer of this option."""
        ...

    def make_branch(self, config: PreTrainedConfig, layer: int, option: str) -> nn.Module:
        """An untrained mixer of this option for one layer."""
        ...

    def run_branch(self, branch: Any, option: str, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The mixer's output `[batch, time, width]`, given what the decoder layer passes to its attention."""
        ...

    def takes_boundaries(self, device: torch.device) -> bool:
        """Whether the mixers keep documents in one row apart on this device, given `packing.marked`'s arguments.

        Where they do not, rows are cut at the boundaries.
        """
        ...

    def initialise(self, branch: Any, attention: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Start a linear branch from the attention's weights and from its input `[batch, time, width]`."""
        ...

    def cache_bytes(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Bytes of cache of one layer for one sequence of `context` tokens in the configuration's dtype."""
        ...

    def flops_per_token(self, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
        """What a forward of one decoder layer does for each token of a sequence of `context` tokens.

        `part` is one of `options`, for that mixer, or `FEED_FORWARD`. Counted as
        `torch.utils.flop_counter.FlopCounterMode` counts eager attention and PyTorch's reference of the linear mixer:
        all of the scores, also those above the diagonal.
        """
        ...
