"""Races of plans that spend a budget otherwise: bytes and several options."""

import numpy as np
import pytest
import torch
from surfaces import Forgetful, search_on

from flashmorph.plan import FULL, Budget, Plan, Space, every_plan
from flashmorph.selection import STRATEGIES, Cost
from flashmorph.selection.respending import improve_by_respending, respent
from flashmorph.selection.strategy import Swaps

OPTIONS = (FULL, "window", "thin")
BUDGET = Budget("kv", 130, 256)


def bytes_of_cache() -> Space:
    """Eight layers; a full one costs as much as seven thin ones."""
    return Space(Space.of_layers(8, OPTIONS).groups, OPTIONS, np.tile([50.0, 2.0, 7.0], (8, 1)))


class Pairs(Forgetful):
    """Layers 1 and 4 help together when full, and each layer a little when it is thin."""

    def __init__(self, space: Space):
        self.space, self.cost, self.num_questions = space, Cost(), 16
        self._difficulty = np.random.default_rng(0).exponential(size=16)

    def _loss(self, gates: torch.Tensor) -> torch.Tensor:
        full, thin = gates[:, 0], gates[:, 2]
        return 6 - 3 * full[1] * full[4] - 0.1 * thin.sum() - 0.05 * full.sum()

    def loss(self, plan: Plan) -> float:
        return self._loss(torch.tensor(self.space.one_hot(plan))).item()

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        chosen = list(range(self.num_questions) if questions is None else questions)
        return np.array([self.loss(plan) + self._difficulty[chosen] for plan in plans])

    def gradient(self, gates, step, loss, data="questions"):
        gates = gates.clone().requires_grad_()
        value = self._loss(gates)
        value.backward()
        return value.item(), gates.grad


NONE = np.zeros(8, dtype=bool)


def test_what_one_group_takes_others_pay_for_and_what_is_left_is_spent():
    space, gradient = bytes_of_cache(), np.zeros((8, 3))
    gradient[:, 2] = -np.arange(8) / 10  # Thin helps, the later the more.
    own = (0, 2, 2, 2, 2, 2, 2, 2)
    # The full layer helps nothing and pays alone.
    assert respent(space, own, 3, 0, gradient, 99.0, NONE) == (1, 2, 2, 0, 2, 2, 2, 2)
    # Where it is spared, the thin layers that help least pay.
    first = NONE | (np.arange(8) == 0)
    assert respent(space, own, 3, 0, gradient, 130.0, first) == (0, 1, 1, 0, 1, 2, 2, 2)
    assert respent(space, own, 3, 0, gradient, 99.0, first) is None
    # A full layer less leaves bytes, and nothing is thin yet: the most helpful ones become so, as many as fit.
    assert respent(space, (0, 1, 1, 1, 1, 1, 1, 1), 0, 1, gradient, 36.0, NONE) == (1, 1, 1, 1, 2, 2, 2, 2)


@pytest.mark.parametrize("first", [1, 4, 6])
def test_a_pair_is_seen_that_thin_layers_have_to_pay_for(first):
    """Beside one full layer all others are thin; two full ones leave bytes for three thin ones only."""
    space = bytes_of_cache()
    objective, trace = Pairs(space), []
    start = space.of_options([0 if layer == first else 2 for layer in range(8)], BUDGET)
    found = improve_by_respending(search_on(space, BUDGET, objective), start, Swaps(6, 8), 0, trace)
    if first == 6:  # Neither of the two helps alone: no gradient names them.
        assert objective.loss(found) <= objective.loss(start)
        return
    assert set(found.full_layers) == {1, 4} and space.cost_of(found) <= 130 and trace
    assert objective.loss(found) == pytest.approx(min(map(objective.loss, every_plan(space, BUDGET))))


@pytest.mark.parametrize("seed", range(4))
def test_the_default_search_spends_bytes_on_several_options(seed):
    space = bytes_of_cache()
    objective = Pairs(space)
    found = STRATEGIES["budgeted-gates"].run(search_on(space, BUDGET, objective, seed)).plan
    assert objective.loss(found) == pytest.approx(min(map(objective.loss, every_plan(space, BUDGET))))
