"""The mean of a whole step, however it is cut into micro-batches and dealt out to processes.

A stage's loss is a sum of ratios: the divergence of all learnt tokens over their number, or for each layer the squared
error over the squared size. A mean of the ratios of micro-batches would be another function wherever micro-batches
weigh differently. So each micro-batch gives the gradient of what is above the line, and the gradient of the step is
divided once by what is below it, counted over all micro-batches and processes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from flashmorph import distributed


def token_mean(loss: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
    """A mean `loss` `[]` over so many learnt tokens as a stage's loss returns it; see `StepMean`."""
    return {"loss": loss, "sums": torch.stack([loss * tokens]), "sizes": loss.new_tensor([float(tokens)])}


class StepMean:
    """Brings a step's micro-batches together.

    What a stage's loss returns has `sums` `[terms]`, with gradient, and `sizes` `[terms]`, without; its loss is
    `Σ sums / sizes`, both summed over the step. A loss without the two counts each micro-batch as one. `terms` lists
    the weights that each term trains; by default all weights belong to a single one.
    """

    def __init__(self, terms: Sequence[Sequence[nn.Parameter]]):
        self._terms = terms
        self._parts: list[torch.Tensor] = []

    def add(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A micro-batch; what to run the backward from, `[]`."""
        sums = outputs["sums"] if "sums" in outputs else outputs["loss"][None]
        sizes = outputs["sizes"] if "sizes" in outputs else torch.ones_like(sums)
        self._parts.append(torch.stack([sums, sizes]).detach())
        return sums.sum()

    @torch.no_grad()
    def finish(self) -> float:
        """Divide the gradients of the step, once they are brought together; the step's loss, the same in each process.

        A term of which there is nothing in the whole step counts 0.
        """
        sums, sizes = distributed.total(torch.stack(self._parts).cpu().double().sum(0))
        self._parts = []
        for weights, size in zip(self._terms, sizes.tolist(), strict=True):
            # Processes average their gradients, whole or divided.
            factor = distributed.count() / size if size else 0.0
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.mul_(factor)
        return torch.where(sums == 0, sums, sums / sizes).sum().item()
