"""On random surfaces every strategy finds the plans of version 0.2 and asks the same questions in the same order.

`plans_of_0_2.json` was written by this file with the strategies as they were before they thought in moves; the races at
the end of `budgeted-gates` came later. Strategies that came later have no plans there and are not run:

    PYTHONPATH=src:tests python tests/test_same_plans.py
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from surfaces import Forgetful, search_on

from flashmorph.plan import Budget, Plan, Space
from flashmorph.selection import STRATEGIES
from flashmorph.selection.strategy import EACH_TASK, Cost, Distilled

KNOWN = Path(__file__).with_name("plans_of_0_2.json")
SETTINGS = {
    "kl": [{"steps": 2}],
    "budgeted-gates": [{"steps": 7, "random_budget": free, "swaps": 2 * free} for free in (True, False)],
    "gates": [{"steps": 6}],
    "l0": [{"steps": 6}],
    "nll": [{}, {"direction": "switch"}],
    "race": [{}, {"swaps": False}, {"start_questions": 3, "confidence": 0.95}],
}
NAMES = list(dict.fromkeys(about.split()[0] for about in json.loads(KNOWN.read_text())))


class Surface(Forgetful):
    """Groups help alone and in pairs, the questions each in their own way; `asked` is all that was asked, in order."""

    def __init__(self, space: Space, seed: int):
        rng, groups = np.random.default_rng(seed), len(space.groups)
        self.cost, self.num_questions, self.asked = Cost(), 24, []
        self._space, self._full = space, space.options.index("full")
        self._alone = rng.exponential(size=groups) * (rng.random(groups) < 0.6)
        self._pairs = np.triu(0.7 * rng.normal(size=(groups, groups)), 1)
        self._questions = 0.5 * (seed % 2) * rng.normal(size=(self.num_questions, groups))
        self._difficulty = rng.exponential(size=self.num_questions)

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        chosen = list(range(self.num_questions) if questions is None else questions)
        self.asked.append([[strip(plan) for plan in plans], chosen])
        full = np.stack([self._gates(plan) for plan in plans])
        helps = full @ self._alone + ((full @ self._pairs) * full).sum(1)
        return 9 - helps[:, None] + self._difficulty[chosen] - full @ self._questions[chosen].T

    def gradient(self, gates, step, loss, data="questions"):
        self.asked.append([step, loss, "questions" if data == EACH_TASK else data])  # There is one task.
        full = gates.detach().double().numpy()[:, self._full]
        gradient = np.zeros(gates.shape)
        question = self._questions[step % self.num_questions]
        gradient[:, self._full] = -(self._alone + self._pairs @ full + full @ self._pairs + question)
        return float(9 - full @ self._alone - full @ self._pairs @ full), torch.tensor(gradient, dtype=gates.dtype)

    def text_losses(self, plans, report=None) -> list[float]:
        self.asked += [strip(plan) for plan in plans]
        every = [self._gates(plan) for plan in plans]
        return [float(2 - 0.05 * (full @ self._pairs @ full) - 0.02 * full.sum()) for full in every]

    def distill(self, path, steps, answers=False) -> Distilled:
        self.asked.append([[strip(plan) for plan in path], steps])
        full = self._gates(path[-1])
        left = 3 - 0.2 * (full @ self._alone) / steps - 0.1 * (full @ self._pairs @ full)
        return Distilled(float(left), 2.0, np.zeros(self.num_questions))

    def _gates(self, plan: Plan) -> np.ndarray:
        return self._space.one_hot(plan)[:, self._full]


def strip(plan: Plan) -> str:
    return "".join("1" if option == "full" else "0" for option in plan.assignments.values())


def cases(name: str) -> Iterator[tuple[str, Space, Budget, int, dict]]:
    """Spaces of 4 to 9 layers with two options, under budgets of all three kinds."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        layers, other = int(rng.integers(4, 10)), "linear" if seed % 3 else "sliding"
        counted = Space.of_layers(layers, ("full", other))
        full, least = float(rng.integers(50, 100)), float(rng.integers(0, 20))
        in_bytes = Space(counted.groups, counted.options, np.tile([full, least], (layers, 1)))
        limit = layers * least + rng.uniform(1.1, layers - 1) * (full - least)
        budgets = {
            "layers": (counted, Budget("layers", int(rng.integers(1, layers)))),
            "share": (counted, Budget("share", float(rng.uniform(0.3, 0.9)))),
            "kv": (in_bytes, Budget("kv", float(limit), 512)),
        }
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            for kind, (space, budget) in budgets.items():
                yield f"{name} {number}, seed {seed}, {kind}", space, budget, seed, settings


def found(name: str) -> dict[str, list[str]]:
    """The plan of each case, and a digest of what was asked for it."""
    results = {}
    for about, space, budget, seed, settings in cases(name):
        objective = Surface(space, seed)
        run = getattr(STRATEGIES[name], "run", STRATEGIES[name])
        plan = run(search_on(space, budget, objective, seed), **settings).plan
        results[about] = [strip(plan), hashlib.sha256(json.dumps(objective.asked).encode()).hexdigest()[:12]]
    return results


@pytest.mark.parametrize("name", NAMES)
def test_plans_and_questions_are_those_of_0_2(name):
    known = {about: values for about, values in json.loads(KNOWN.read_text()).items() if about.split()[0] == name}
    assert found(name) == known and known


if __name__ == "__main__":
    everything = {about: values for name in NAMES for about, values in found(name).items()}
    lines = [f"{json.dumps(about)}: {json.dumps(values)}" for about, values in everything.items()]
    KNOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
