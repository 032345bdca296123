"""What enters each output projection of a model with every layer full, and what changes where some of it is replaced.

With the attention of all other layers held at what it was, a change passes through residuals and feed-forward alone,
position by position.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flashmorph.hosts.parts import input_norm_of, layers_of
from flashmorph.mixers.mixer import LayerArguments
from flashmorph.model.layer import MorphableLayer
from flashmorph.model.morphable import Morphable
from flashmorph.plan import FULL


class Recording:
    """One forward with every layer full: by layer, its input and what enters its output projection.

    `hidden[layer]` is `[batch, time, width]`, `heads[layer]` `[batch, time, heads · head_dim]`.
    """

    def __init__(self, morphable: Morphable, ids: torch.Tensor):
        self.hidden: list[torch.Tensor] = []
        self.heads: list[torch.Tensor] = []
        self._calls: list[LayerArguments] = []
        self._arguments: list[LayerArguments] = []
        self._morphable = morphable

        def keep_call(module: nn.Module, inputs: Any, arguments: LayerArguments) -> None:
            self.hidden.append(inputs[0] if inputs else arguments["hidden_states"])
            self._calls.append({name: value for name, value in arguments.items() if name != "hidden_states"})

        def keep_arguments(
            layer: MorphableLayer, hidden: torch.Tensor, arguments: LayerArguments, output: torch.Tensor
        ) -> None:
            self._arguments.append(arguments)

        hooks = [layer.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in self._layers]
        hooks += [
            self.projection(number).register_forward_pre_hook(lambda module, inputs: self.heads.append(inputs[0]))
            for number in range(len(self._layers))
        ]
        try:
            self.last = morphable(ids, observer=keep_arguments)
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _layers(self) -> nn.ModuleList:
        return layers_of(self._morphable.model)

    def projection(self, layer: int) -> nn.Linear:
        """The output projection of a layer's attention."""
        branch: Any = self._morphable.layers[layer].branches[FULL]
        return getattr(branch.module, branch.mixer.projection)

    def attention(self, layer: int, at: Sequence[int] | None = None) -> torch.Tensor:
        """What the layer's attention gave, `[batch, time, width]`, at some positions."""
        heads = self.heads[layer]
        return self.projection(layer)(heads if at is None else heads[:, at])

    def after(self, layer: int, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The output of a decoder layer with this input and this output of its attention, `[rows, positions, width]`.

        No position sees another.
        """
        with self._standing_in(layer, attention):
            output = self._layers[layer](hidden, **{**self._calls[layer], "gates": None, "observer": None})
        return output[0] if isinstance(output, tuple) else output

    def heads_given(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What would enter the output projection if the layer's input were `hidden`, `[batch, time, width]`."""
        found: list[torch.Tensor] = []
        norm = input_norm_of(self._layers[layer])
        hook = self.projection(layer).register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            self._morphable.layers[layer].branches[FULL](norm(hidden), self._arguments[layer])
        finally:
            hook.remove()
        return found[0]

    @contextmanager
    def _standing_in(self, layer: int, output: torch.Tensor) -> Iterator[None]:
        """Within this, the layer's attention gives `output` whatever comes."""
        slot = self._morphable.host.slot(FULL)
        module, kept = self._layers[layer], getattr(self._layers[layer], slot)
        setattr(module, slot, _Gives(output))
        try:
            yield
        finally:
            setattr(module, slot, kept)


class _Gives(nn.Module):
    def __init__(self, output: torch.Tensor):
        super().__init__()
        self._output = output

    def forward(self, *inputs: Any, **arguments: Any) -> tuple[torch.Tensor, None]:
        return self._output, None
