"""Adam with one second moment for all gates.

Adam divides every logit's step by that logit's own gradient size, so a layer that matters much and one that matters
little climb alike, and their order is left to noise. With one second moment for all, steps keep the proportions of the
gradients.
"""

from collections.abc import Callable
from typing import Any

import torch


class SharedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) whose `v` is the mean over the whole tensor."""

    def __init__(
        self, params: list[torch.Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; without a closure."""
        assert closure is None
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": torch.zeros(()),
                    }
                state["step"] += 1
                state["exp_avg"].lerp_(weight.grad, 1 - first)
                state["exp_avg_sq"].lerp_(weight.grad.square().mean(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** state["step"])
                size = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt()
                weight -= group["lr"] * mean / (size + group["eps"])
