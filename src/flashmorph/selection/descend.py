"""The one loop of every strategy that follows gradients: Adam on the gates' logits, batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flashmorph.errors import UserError
from flashmorph.selection.shared_adam import SharedAdam
from flashmorph.selection.strategy import Objective


@dataclass(frozen=True)
class Schedule:
    """`steps` updates, the learning rate falling from `start` to `end` along a half cosine."""

    steps: int
    start: float
    end: float

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        return self.end + (self.start - self.end) * 0.5 * (1 + np.cos(np.pi * step / max(1, self.steps - 1)))


def descend(
    objective: Objective,
    logits: torch.Tensor,
    to_gates: Callable[[torch.Tensor, int], torch.Tensor],
    schedule: Schedule,
    loss: str,
    data: str = "questions",
    regulariser: Callable[[torch.Tensor], torch.Tensor] | None = None,
    after_step: Callable[[torch.Tensor], object] | None = None,
    shared_moment: bool = False,
) -> list[dict]:
    """Train `logits` in place and return the trace, one entry a step.

    `loss` and `data` are what `Objective.gradient` is asked for. `to_gates(logits, step)` gives the gates
    `[groups, options]` that the model runs with (differentiable); `regulariser(logits)` is added to the loss;
    `after_step(logits)` may project (in place, without gradient). Gradients are not clipped: a gate's size of step is
    Adam's. With `shared_moment` that is one size for all of them (`SharedAdam`).

    The loop keeps its state with the objective, which makes a killed search go on where it stopped.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    logits.requires_grad_(True)
    kind = SharedAdam if shared_moment else torch.optim.Adam
    optimizer = kind([logits], lr=schedule.start)
    trace: list[dict] = []
    first = objective.restore(logits, optimizer, trace)
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        gates = to_gates(logits, step)
        value, gradient = objective.gradient(gates.detach(), step, loss, data)
        if not np.isfinite(value) or not torch.isfinite(gradient).all():
            raise UserError(
                f"the {loss} loss of the gates is not finite at step {step}: look at the teacher's and the branches' "
                "weights"
            )
        optimizer.zero_grad()
        penalty = regulariser(logits) if regulariser else logits.sum() * 0
        ((gates * gradient).sum() + penalty).backward()
        optimizer.step()
        if after_step:
            with torch.no_grad():
                after_step(logits)
        trace.append({"step": step, "loss": value, "gates": gates.detach()[:, 0].tolist(), "logits": _first(logits)})
        objective.progress(step + 1, schedule.steps, loss=value)
        objective.keep(step + 1, logits, optimizer, trace)
    logits.requires_grad_(False)
    return trace


def _first(logits: torch.Tensor) -> list[float]:
    values = logits.detach()
    return (values if values.ndim == 1 else values[:, 0] - values[:, 1:].amax(1)).tolist()
