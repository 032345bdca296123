"""One layer of a morphable model: the branches that stand in place of its attention, and their errors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from flashmorph.mixers import Mixer, gated
from flashmorph.mixers.mixer import LayerArguments
from flashmorph.own import CACHE
from flashmorph.plan import FULL

Observer = Callable[["MorphableLayer", torch.Tensor, LayerArguments, torch.Tensor], None]
"""Is shown a layer, its input `[batch, time, width]`, its arguments and its output `[batch, time, width]`."""


class Branch(nn.Module):
    """One mixer of one layer. Its forward is all that runs of it, so that it can be sharded as one unit."""

    def __init__(self, mixer: Mixer, module: nn.Module):
        super().__init__()
        self.mixer, self.module = mixer, module

    def forward(
        self, hidden: torch.Tensor, arguments: LayerArguments, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output `[batch, time, width]`, under a `gate` `[1]` or `[kv_heads]` if there is one."""
        if gate is None:
            return self.mixer.run(self.module, hidden, arguments)
        return gated(self.mixer, self.module, hidden, arguments, gate)


class MorphableLayer(nn.Module):
    """Stands where the attention stood in a decoder layer; `branches` has a branch for each option.

    `number` of `layers`: its index in the decoder. Its rows of the gates are one, or one for each key-value head.
    """

    def __init__(self, number: int, layers: int, branches: Mapping[str, Branch]):
        super().__init__()
        self.number, self.layers = number, layers
        self.branches = nn.ModuleDict(branches)

    @property
    def others(self) -> dict[str, Branch]:
        """All branches but `full`."""
        return {option: branch for option, branch in self.branches.items() if option != FULL}  # type: ignore[misc]

    @property
    def trained(self) -> dict[str, Branch]:
        """The branches that have weights of their own."""
        return {option: branch for option, branch in self.others.items() if branch.mixer.trainable}

    def forward(
        self,
        hidden_states: torch.Tensor,
        gates: torch.Tensor | None = None,
        observer: Observer | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        """The gated sum of all branches; `full` without `gates` `[groups, options]`.

        Raises:
            ValueError: a cache was handed in; `Morphable.instantiate` makes the model that generates.
        """
        if arguments.get(CACHE) is not None:
            raise ValueError("a morphable model has no cache; build the plan first and generate with the result")
        own = None if gates is None else gates.unflatten(0, (self.layers, -1))[self.number]
        output = self._mix(hidden_states, own, arguments)
        if observer:
            observer(self, hidden_states, arguments, output)
        return output, None

    def _mix(self, hidden: torch.Tensor, gates: torch.Tensor | None, arguments: LayerArguments) -> torch.Tensor:
        if gates is None:
            return self.branches[FULL](hidden, arguments)
        branches, used = list(self.branches.values()), range(gates.shape[1])
        if not torch.is_grad_enabled():
            rows = gates.tolist()
            used = [option for option in used if any(row[option] for row in rows)] or [0]
            if len(used) == 1 and all(row[used[0]] == 1 for row in rows):
                return branches[used[0]](hidden, arguments)
        columns = gates.to(hidden.device, hidden.dtype).unbind(1)
        return torch.stack([branches[option](hidden, arguments, columns[option]) for option in used]).sum(0)


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`|output - target|^2 / |target|^2`, in float32: 1 is what a silent branch would have."""
    difference, size = squares(output, target)
    return difference / size


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`|output - target|^2` and `|target|^2`, in float32, `[2]`."""
    target = target.float()
    return torch.stack([(output.float() - target).square().sum(), target.square().sum()])
