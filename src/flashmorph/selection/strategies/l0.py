"""Hard-concrete masks under an augmented Lagrangian on their count: ConSA's form (arXiv 2606.18056).

A layer's gate is a hard-concrete variable (Louizos et al., arXiv 1712.01312): a logistic sample around `log_alpha`,
stretched to (gamma, zeta) and cut to [0, 1], so that it is exactly 0 or 1 with positive probability. The expected
number of open gates is differentiable; with its excess e over the budget, `multiplier * e + quadratic * e^2 / L` is
descended by the gates and ascended by the two multipliers, until the budget is spent by itself.

ConSA trains the model's weights beside the masks. Here they are frozen, and the loss is the answers'. What was at hand
of the paper names neither the optimiser nor its rates nor the start: here Adam moves masks and multipliers alike, and
the gates start nearly open. Where two layers share one task, both can stay half open and push out a third.
"""

import math

import numpy as np
import torch

from flashmorph.inputs.settings import FinalRate, Rate
from flashmorph.plan import FULL
from flashmorph.selection.descend import Loss, Schedule, descend
from flashmorph.selection.moves import most_moves
from flashmorph.selection.strategy import Search, Selection, Steps, Strategy, group_scores

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
_OPEN_AT_START = 0.9
_SMALLEST = 1e-6


def l0(
    search: Search,
    steps: Steps = 150,
    learning_rate: Rate = 0.05,
    final_learning_rate: FinalRate = 0.05,
) -> Selection:
    """Hard-concrete masks under an augmented Lagrangian on their count (ConSA, arXiv 2606.18056).

    The layers with the largest `log_alpha` stay full. The masks start nearly all open, so that layers which help only
    together are still together when the Lagrangian starts to close them. In the trace, `logits` holds `log_alpha` of
    each layer and then the two multipliers.

    Raises:
        UserError: see `Space.limit`.
    """
    space, budget = search.space, search.budget
    kept = most_moves(space, budget)
    layers = len(space.groups)
    uniforms = np.random.default_rng(search.seed).uniform(_SMALLEST, 1 - _SMALLEST, size=(steps, layers))
    noise = torch.tensor(np.log(uniforms) - np.log1p(-uniforms), dtype=torch.float32)
    start = math.log(_OPEN_AT_START / (1 - _OPEN_AT_START)) + _open_offset()
    # The loop trains and keeps one tensor; with the multipliers in it, a killed search finds them again.
    masks_and_multipliers = torch.tensor([start] * layers + [0.0, 0.0])

    def to_gates(state: torch.Tensor, step: int) -> torch.Tensor:
        full = hard_concrete(state[:layers], noise[step])
        return torch.stack([full, 1 - full], 1)

    def lagrangian(state: torch.Tensor) -> torch.Tensor:
        multiplier, quadratic = state[layers:]
        excess = open_probability(state[:layers]).sum() - kept
        # Over L, the square pushes a single gate as hard in a deep model as in a shallow one.
        square = excess.square() / layers
        descended = multiplier.detach() * excess + quadratic.detach() * square
        ascended = multiplier * excess.detach() + quadratic * square.detach()
        return descended - ascended

    schedule = Schedule(steps, learning_rate, final_learning_rate)
    trace = descend(search, masks_and_multipliers, to_gates, schedule, Loss("answers", regulariser=lagrangian))
    # Above the least of them, since a budget of bytes leaves out what has a negative score.
    log_alpha = masks_and_multipliers[:layers]
    scores = group_scores(space, (log_alpha - log_alpha.min()).tolist(), FULL)
    return Selection(space.best(scores, budget), scores, trace, search.objective.cost)


L0 = Strategy(l0, gradient_loss="answers", two_options=True, gate_label="log α of the gate")


def hard_concrete(log_alpha: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gates `[groups]` in [0, 1] from `log_alpha` `[groups]` and logistic `noise` `[groups]`."""
    stretched = torch.sigmoid((noise + log_alpha) / _BETA) * (_ZETA - _GAMMA) + _GAMMA
    return stretched.clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """The probability `[groups]` that a gate is above 0, as Louizos et al. count it."""
    return torch.sigmoid(log_alpha - _open_offset())


def _open_offset() -> float:
    return _BETA * math.log(-_GAMMA / _ZETA)
