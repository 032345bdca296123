"""`Mixer`: one way in which a decoder layer passes information between tokens, and its cost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from flashmorph.plan import FULL

LINEAR = "linear"
SLIDING = "sliding"
LAYER_TYPES: Mapping[str, str] = {FULL: "full_attention", LINEAR: "linear_attention", SLIDING: "sliding_attention"}
"""transformers' word in `layer_types` for each option."""


LayerArguments = dict[str, Any]
"""What a decoder layer passes to its attention beside the hidden states: mask, positions, rope, documents."""


class Products(NamedTuple):
    """Matrix products that one part of a decoder layer does for each token; a multiply-add counts as two.

    `kind` is what a backward adds to them: `input` multiplies the part's own input by weights, `weights` something
    computed by weights, `state` two computed things. `formula` is how `flops` came about, in the names of the
    configuration. `causal` is what kernels do over that: they leave out scores that a causal mask or a window hides,
    and take longer chunks, which may be more. `step` are the operations of mixing, projections left out, for one
    generated token that has the context before it.
    """

    name: str
    kind: Literal["input", "weights", "state"]
    formula: str
    flops: float
    causal: float = 1.0
    step: int = 0


class Kernels(NamedTuple):
    """`functions` of transformers' modelling `module` for which there are faster packages; the first mixes many tokens.

    `apart` are versions of our own that keep packed documents apart on CUDA where no kernel does; `lean` are those that
    need less time and memory than transformers' reference, and run wherever no kernel does. `needs` are functions whose
    kernel calls that of another: it is of no use where there is no kernel for the other. `no_gradient` says why the
    first function's kernel computes no gradients on the GPU that is there: nothing where it does.
    """

    module: str
    functions: tuple[str, ...]
    apart: Mapping[str, Callable[..., Any]] = {}
    lean: Mapping[str, Callable[..., Any]] = {}
    needs: Mapping[str, str] = {}
    no_gradient: Callable[[], str] = lambda: ""


class Mixer(Protocol):
    """One kind of mixer, as an option of a host's layers. Its modules are transformers' own, or those of `own/`.

    `name` is the mixer in words. A mixer that is not `trainable` has no weights of its own, and there is nothing to
    align. One that `borrows` runs on the attention's projections, whatever weights it has besides. `separable_by_head`:
    what enters its output projection, the submodule `projection`, divides evenly into parts that belong to one
    key-value head each, and no part depends on which others are used.
    """

    name: str
    trainable: bool
    borrows: bool
    separable_by_head: bool
    projection: str
    kernels: Kernels | None

    def build(self, config: PreTrainedConfig, layer: int, attention: nn.Module) -> nn.Module:
        """An untrained mixer for one layer of a host's configuration, to run beside `attention`."""
        ...

    def initialise(self, module: Any, attention: Any, hidden: torch.Tensor, arguments: LayerArguments) -> None:
        """Start `module` from the attention's weights and from its input `[batch, time, width]`."""
        ...

    def settle(self, modules: Sequence[Any]) -> None:
        """Choose what the modules of all layers share, after each has been initialised."""
        ...

    def run(self, module: Any, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
        """The output `[batch, time, width]`, given what the decoder layer passes to its attention."""
        ...

    def supports_varlen(self, device: torch.device) -> bool:
        """Whether documents in one row stay apart on this device, given the arguments of `isolation.marked`."""
        ...

    def cache_bytes(self, config: PreTrainedConfig, context: int) -> int:
        """Bytes of cache of one layer for one sequence of `context` tokens in the configuration's dtype."""
        ...

    def products(self, config: PreTrainedConfig, context: int) -> list[Products]:
        """The products of one layer's mixer in a forward, for each token of a sequence of `context` tokens.

        Counted as `torch.utils.flop_counter.FlopCounterMode` counts eager attention and PyTorch's reference of a linear
        mixer: all of the scores, also those above the diagonal; but of a window none outside it.
        """
        ...


def gated(
    mixer: Mixer, module: nn.Module, hidden: torch.Tensor, arguments: LayerArguments, gate: torch.Tensor
) -> torch.Tensor:
    """`W (gate * heads(hidden)) + gate * b`, `[batch, time, width]`, W and b those of the output projection.

    `gate` is `[1]` for the whole layer or `[kv_heads]`, which only mixers that are separable by head can be given; of a
    bias, which all heads share, the mean of their gates remains.

    Raises:
        ValueError: a gate for each head, and the mixer is not separable by head.
    """
    if not mixer.separable_by_head:
        if len(gate) > 1:
            raise ValueError(f"{mixer.name} cannot be gated by head")
        return gate * mixer.run(module, hidden, arguments)
    projection = getattr(module, mixer.projection)
    with _projected_apart(projection):
        heads = mixer.run(module, hidden, arguments).unflatten(-1, (len(gate), -1))
    output = F.linear((gate[:, None] * heads).flatten(-2), projection.weight)
    return output if projection.bias is None else output + gate.mean() * projection.bias


@contextmanager
def _projected_apart(projection: nn.Linear) -> Iterator[None]:
    """A module that has this output projection gives what would enter it."""
    projection.forward = lambda heads: heads  # type: ignore[method-assign]
    try:
        yield
    finally:
        del projection.forward
