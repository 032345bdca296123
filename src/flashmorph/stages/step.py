"""The mean over a whole step, independent of its micro-batches and ranks.

A stage's loss is a sum of ratios: the divergence of all targets over their number, or for each layer the squared error
over the squared size. A mean of the micro-batches' ratios would be another function if micro-batches weigh differently.
So each micro-batch gives the gradient of the numerator; the gradient of the step is divided once by the denominator,
summed over all micro-batches and ranks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from flashmorph import distributed


def token_mean(loss: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
    """The outputs of a stage's loss for a mean `loss` `[]` over `tokens` targets; see `StepMean`."""
    return {"loss": loss, "sums": torch.stack([loss * tokens]), "sizes": loss.new_tensor([float(tokens)])}


class StepMean:
    """Accumulates a step's micro-batches.

    A stage's loss returns `sums` `[terms]`, with gradient, and `sizes` `[terms]`, without; the step's loss is
    `Σ sums / sizes`, both summed over the step. `terms` lists the weights that each term trains.
    """

    def __init__(self, terms: Sequence[Sequence[nn.Parameter]]):
        self._terms = terms
        self._parts: list[torch.Tensor] = []

    def add(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Add a micro-batch. Returns the scalar `[]` to run the backward from."""
        self._parts.append(torch.stack([outputs["sums"], outputs["sizes"]]).detach())
        return outputs["sums"].sum()

    @torch.no_grad()
    def finish(self) -> float:
        """Divide the step's gradients, once all ranks have reduced them. Returns the step's loss, equal on all ranks.

        A term of size 0 in the whole step counts 0.
        """
        sums, sizes = distributed.total(torch.stack(self._parts).cpu().double().sum(0))
        self._parts = []
        for weights, size in zip(self._terms, sizes.tolist(), strict=True):
            # Ranks average their gradients, sharded or not.
            factor = distributed.count() / size if size else 0.0
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.mul_(factor)
        return torch.where(sums == 0, sums, sums / sizes).sum().item()
