"""What a search spends, counted alike for every strategy."""

import time

import torch

from flashmorph.model.morphable import Morphable
from flashmorph.selection.strategy import Cost


class Meter:
    """Counts tokens and FLOPs of runs of a morphable model.

    FLOPs: two for each weight and token that runs through it, forward and backward through activations alike;
    attention adds its causal half of `4 * time * width` a token and layer.
    """

    def __init__(self, morphable: Morphable):
        self.cost = Cost()
        self._started = time.perf_counter()
        config = morphable.model.config
        branches = sum(weight.numel() for weights in morphable.branch_parameters() for weight in weights)
        weights = morphable.model.model.layers.named_parameters()
        self._every = round(sum(weight.numel() * morphable.host.active_share(config, name) for name, weight in weights))
        self._one = self._every - branches
        self._attention_width = config.num_hidden_layers * config.num_attention_heads * config.head_dim

    def count(
        self, ids: torch.Tensor, forward: float = 1, backward: float = 0, every_branch: bool = False, weights: float = 0
    ) -> None:
        """A run over `ids` `[rows, length]`.

        `forward` is how often, a part of the layers counting as that part; `backward` likewise; `weights` is how often
        gradients of the weights were computed as well.
        """
        self.cost.tokens_forward += round(forward * ids.numel())
        self.cost.tokens_backward += round(backward * ids.numel())
        run = self._every if every_branch else self._one
        per_token = 2 * run + 2 * ids.shape[1] * self._attention_width
        self.cost.flops += ((forward + backward) * per_token + weights * 2 * run) * ids.numel()

    def resume(self, cost: Cost) -> None:
        """Go on counting from what an interrupted search had spent."""
        self.cost = cost
        self._started = time.perf_counter() - cost.seconds

    def look(self) -> Cost:
        """The cost so far, seconds included."""
        self.cost.seconds = time.perf_counter() - self._started
        return self.cost
