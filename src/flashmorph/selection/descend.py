"""The one loop of every strategy that follows gradients: Adam on the gates' logits, batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flashmorph.errors import UserError
from flashmorph.plan import FULL, Space
from flashmorph.records import Figures
from flashmorph.selection.shared_adam import SharedAdam
from flashmorph.selection.strategy import Search


@dataclass(frozen=True)
class Schedule:
    """`steps` updates, the learning rate falling from `start` to `end` along a half cosine.

    With `shared_moment` all logits share the size of a step (`SharedAdam`); else each has Adam's own.
    """

    steps: int
    start: float
    end: float
    shared_moment: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        return self.end + (self.start - self.end) * 0.5 * (1 + np.cos(np.pi * step / max(1, self.steps - 1)))


class Loss(NamedTuple):
    """What is descended: a loss of the model on `data` (see `Objective.gradient`), plus `regulariser(logits)`."""

    name: str
    data: str = "questions"
    regulariser: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits.sum() * 0


def descend(
    search: Search,
    logits: torch.Tensor,
    to_gates: Callable[[torch.Tensor, int], torch.Tensor],
    schedule: Schedule,
    loss: Loss,
    after_step: Callable[[torch.Tensor], object] | None = None,
) -> list[Figures]:
    """Train `logits` in place. Gradients are not clipped: the size of a step is Adam's.

    Args:
        search: The objective that is asked for gradients, and where the state is kept: a killed search goes on.
        logits: What is trained, `[groups]`, `[groups, options]` or with further numbers behind the groups.
        to_gates: From logits and number of the step to the gates `[groups, options]` that the model runs with;
            differentiable.
        schedule: Number and size of the steps.
        loss: What is descended.
        after_step: May project the logits, in place and without gradient.

    Returns:
        The trace, one entry a step: its number, loss, gates of `full` and logits of `full` above the best other.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    logits.requires_grad_(True)
    kind = SharedAdam if schedule.shared_moment else torch.optim.Adam
    optimizer = kind([logits], lr=schedule.start)
    trace: list[Figures] = []
    objective, first = search.objective, 0
    if search.state and (kept := search.state.restore(logits, optimizer, trace)):
        first, cost = kept
        objective.resume(cost)
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        gates = to_gates(logits, step)
        value, gradient = objective.gradient(gates.detach(), step, loss.name, loss.data)
        if not np.isfinite(value) or not torch.isfinite(gradient).all():
            raise UserError(
                f"the {loss.name} loss of the gates is not finite at step {step}: look at the teacher's and the "
                "branches' weights"
            )
        optimizer.zero_grad()
        ((gates * gradient).sum() + loss.regulariser(logits)).backward()
        optimizer.step()
        if after_step:
            with torch.no_grad():
                after_step(logits)
        full = gates.detach()[:, search.space.options.index(FULL)]
        entry = {"step": step, "loss": value, "gates": full.tolist(), "logits": _of_full(logits, search.space)}
        trace.append(entry)
        search.report(step + 1, schedule.steps, loss=value)
        if search.state:
            search.state.keep(step + 1, logits, optimizer, trace, objective.cost)
    logits.requires_grad_(False)
    return trace


def _of_full(logits: torch.Tensor, space: Space) -> list[float]:
    """Logits of staying full, `[groups]` or with what stands behind the groups."""
    values = logits.detach()
    return (values if values.ndim == 1 else space.worth(values.numpy())).tolist()
