"""What a host is: a stock hybrid architecture that a teacher can be moved into without changing what it computes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flashmorph.hosts.serving import Engine

LINEAR = "linear"
FEED_FORWARD = "feed-forward"
"""The part of a decoder layer that is not its mixer, for `Host.flops_per_token`."""
_LAYER = re.compile(r"model\.layers\.\d+\.")


class Products(NamedTuple):
    """Matrix products that one part of a decoder layer does for each token; a multiply-add counts as two.

    `kind` says what a backward adds to them: `input` multiplies the part's own input by weights, `weights` something
    computed by weights, `state` two computed things. `formula` is how `flops` came about, in the names of the
    configuration. `causal` is the share of them that kernels do: they leave out scores that a causal mask or a window
    hides, and hand states on from chunk to chunk.
    """

    name: str
    kind: Literal["input", "weights", "state"]
    formula: str
    flops: float
    causal: float = 1.0


class Host(Protocol):
    """One host architecture; the only place that knows names of model types, modules and weights.

    `teachers` maps their `model_type`s to what they are in words; `options` maps the options of a layer to the host's
    `layer_types` words, `mixers` to what a layer is then. `settings` says in words what each setting of `host_config`
    does; `serves` is what runs the checkpoints. `kernels` are the functions of transformers' module `modelling` for
    which there are faster packages. Where `branches_train` is false, its branches have no weights of
    their own, and there is nothing to align.
    """

    name: str
    teachers: Mapping[str, str]
    options: Mapping[str, str]
    mixers: Mapping[str, str]
    settings: Mapping[str, str]
    serves: tuple[Engine, ...]
    model_class: type[PreTrainedModel]
    model_type: str
    modelling: str
    kernels: tuple[str, ...]
    branches_train: bool

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a teacher that has no exact counterpart here.

        Raises:
            UserError: names the part that does not fit.
        """
        ...

    def host_config(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """The host's configuration for this teacher, with every layer full.

        Further parameters, with defaults, are settings of the host: `host.<name>` in a recipe.

        Raises:
            UserError: a setting that this teacher does not fit.
        """
        ...

    def host_state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host's weights, all layers full, computed from the teacher's in `state`.

        `state` holds any number of whole decoder layers, and any of the weights outside of them: a checkpoint that does
        not fit into memory moves layer by layer.
        """
        ...

    def with_layer_types(self, config: PreTrainedConfig, options: list[str]) -> PreTrainedConfig:
        """A copy of the host's configuration whose layer l is `options[l]`."""
        ...

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """What config.json shall say, given what transformers writes: some engines read other words."""
        ...

    def attention_name(self, option: str) -> str:
        """The attribute of a decoder layer that holds the mixer of this option."""
        ...

    def make_branch(self, config: PreTrainedConfig, layer: int, option: str, attention: nn.Module) -> nn.Module:
        """An untrained mixer of this option for one layer, to stand beside `attention`."""
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

    def share_run(self, config: PreTrainedConfig, name: str) -> float:
        """The share of a layer's weight of this name that one token runs through: below 1 for experts."""
        ...

    def cache_bytes(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Bytes of cache of one layer for one sequence of `context` tokens in the configuration's dtype."""
        ...

    def mixing_operations(self, config: PreTrainedConfig, option: str, context: int) -> int:
        """Multiplications and additions of one layer's mixer for one token that sees `context` tokens.

        Those of its projections are not counted. At most linear in `context`.
        """
        ...

    def flops_per_token(self, config: PreTrainedConfig, part: str, context: int) -> list[Products]:
        """What a forward of one decoder layer does for each token of a sequence of `context` tokens.

        `part` is one of `options`, for that mixer, or `FEED_FORWARD`, of experts those that a token goes through.
        Counted as `torch.utils.flop_counter.FlopCounterMode` counts eager attention and PyTorch's reference of the
        linear mixer: all of the scores, also those above the diagonal; but of a window none outside it.
        """
        ...


def layer_prefixes(names: Iterable[str]) -> list[str]:
    """What the names of each decoder layer's weights begin with, `model.layers.3.`, of the layers among `names`."""
    found = (_LAYER.match(name) for name in names)
    return list(dict.fromkeys(match.group() for match in found if match))
