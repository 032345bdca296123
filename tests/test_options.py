"""Every strategy chooses among any number of options, and among heads as among layers, or says that it cannot."""

import itertools
import math

import numpy as np
import pytest
import torch
from surfaces import Forgetful, effects_like, search_on

from flashmorph.errors import UserError
from flashmorph.plan import FULL, Budget, Costs, Group, Plan, Space, count_plans, every_plan
from flashmorph.selection import DEFAULT_STRATEGY, STRATEGIES, Cost, Search
from flashmorph.selection.search import check_search, select
from flashmorph.selection.strategy import Distilled

OPTIONS = (FULL, "linear", "sliding")
WORTH = np.array([0.3, 2.0, 0.2, 1.5, 0.1, 0.8])
SHARE = {FULL: 1.0, "sliding": 0.25, "linear": 0.0}
"""How much of a layer's worth each option has."""
ANY = [name for name, strategy in STRATEGIES.items() if not strategy.two_options]
TWO = [name for name, strategy in STRATEGIES.items() if strategy.two_options]
SEARCHING = [name for name in ANY if STRATEGIES[name].searches]
BUDGET = Budget("layers", 1)
SHORT = {"kl": {"steps": 2}, "budgeted-gates": {"steps": 40}}


def layers() -> Space:
    """Six layers of three options, layers counted."""
    return Space.of_layers(len(WORTH), OPTIONS)


def bytes_of_cache() -> Space:
    """The same in bytes: a sliding layer costs a fifth of a full one."""
    return Space(layers().groups, OPTIONS, np.tile([100.0, 2.0, 20.0], (len(WORTH), 1)))


def heads() -> Space:
    """Three layers of two key-value heads each."""
    groups = tuple(Group(f"layers.{layer}.kv_heads.{head}") for layer in range(3) for head in range(2))
    return Space(groups, (FULL, "linear"), np.tile([1.0, 0.0], (6, 1)))


COSTS = Costs(
    "",
    "",
    "",
    1024,
    {"kind": "estimated", "device": "GPU", "dtype": "float32"},
    500,
    {group: {FULL: 100 + index, "linear": 2, "sliding": 20} for index, group in enumerate(layers().groups)},
)
TIME = Budget.parse("ms=0.8@1024").priced(COSTS)


def milliseconds() -> Space:
    """The same in microseconds, of which no plan changes 500; groups differ."""
    return Space(layers().groups, OPTIONS, COSTS.table(layers().groups, OPTIONS))


CASES = {
    "three options, layers counted": (layers(), Budget("layers", 2)),
    "three options, bytes": (bytes_of_cache(), Budget("kv", 300, 1024)),
    "heads, a share": (heads(), Budget("share", 0.4)),
    "three options, milliseconds": (milliseconds(), TIME),
    "heads, bytes": (Space(heads().groups, (FULL, "linear"), np.tile([50.0, 1.0], (6, 1))), Budget("kv", 120, 1024)),
}


class Additive(Forgetful):
    """An objective whose loss falls by each group's worth, as far as its option has it; every question alike but for
    its difficulty."""

    def __init__(self, space: Space):
        self.space, self.cost, self.num_questions = space, Cost(), 12
        self._help = np.outer(WORTH, [SHARE[option] for option in space.options])
        self._difficulty = np.random.default_rng(0).exponential(size=self.num_questions)

    def loss(self, plan: Plan) -> float:
        return 6 - float((self.space.one_hot(plan) * self._help).sum())

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        chosen = list(range(self.num_questions) if questions is None else questions)
        return np.array([self.loss(plan) + self._difficulty[chosen] for plan in plans])

    def effects(self, groups, pairs, kind, receivers, report) -> np.ndarray:
        return effects_like(WORTH, groups, pairs)

    def gradient(self, gates, step, loss, data="questions"):
        help = torch.tensor(self._help, dtype=gates.dtype)
        return float(6 - (gates * help).sum()), -help

    def text_losses(self, plans, report=None) -> list[float]:
        return [2 + 0.01 * self.loss(plan) + 0.001 * len(plan.full_groups) for plan in plans]

    def distill(self, path, steps, answers=False) -> Distilled:
        return Distilled(self.loss(path[-1]) / steps, 2.0, np.zeros(self.num_questions))


def find(strategy: str, space: Space, budget: Budget, **settings):
    return STRATEGIES[strategy].run(
        search_on(space, budget, Additive(space)), **{**SHORT.get(strategy, {}), **settings}
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ANY)
def test_a_plan_keeps_its_budget(strategy, case):
    space, budget = CASES[case]
    found = find(strategy, space, budget)
    spent, limit = space.cost_of(found.plan), space.limit(budget)
    assert spent == limit if budget.resource in ("layers", "share") else spent <= limit
    assert list(found.plan.assignments) == list(space.groups)
    assert set(found.plan.assignments.values()) <= set(space.options)
    assert found.scores.shape == space.cost.shape and np.isfinite(found.scores).all()
    assert all(list(entry["assignments"]) == list(space.groups) for entry in found.trace if "assignments" in entry)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", [name for name in SEARCHING if name != "halo"])
def test_where_groups_add_up_the_best_plan_is_found_or_one_like_it(strategy, case):
    space, budget = CASES[case]
    objective = Additive(space)
    best = min(map(objective.loss, every_plan(space, budget)))
    worst = max(map(objective.loss, every_plan(space, budget)))
    found = objective.loss(find(strategy, space, budget).plan)
    assert found - best <= 0.15 * (worst - best)


def test_exhaustive_finds_the_best_of_all():
    for space, budget in CASES.values():
        objective = Additive(space)
        best = min(map(objective.loss, every_plan(space, budget)))
        assert objective.loss(find("exhaustive", space, budget).plan) == pytest.approx(best)


@pytest.mark.parametrize("strategy", ["greedy-forward", "greedy-backward", "race", "exhaustive"])
def test_options_that_cost_nothing_more_are_taken_where_they_help(strategy):
    space, budget = CASES["three options, layers counted"]
    plan = find(strategy, space, budget).plan
    assert plan.full_layers == [1, 3]
    assert set(plan.assignments.values()) == {FULL, "sliding"}


@pytest.mark.parametrize("strategy", TWO)
def test_a_strategy_of_two_options_says_so_before_it_asks(strategy):
    with pytest.raises(
        UserError, match=f"strategy {strategy} chooses between two options; here .* full, linear, sliding"
    ):
        check_search(strategy, layers(), Budget("layers", 2), 12, {})
    groups = find(strategy, *CASES["heads, a share"]).plan.assignments
    assert list(groups) == list(heads().groups)


@pytest.mark.parametrize("name", ["first", "last", "middle", "uniform"])
def test_fixed_layouts_of_heads_are_whole_layers(name):
    space = heads()
    plan = STRATEGIES[name].run(Search(space, Budget("share", 0.34))).plan
    assert plan.full_layers == {"first": [0], "last": [2], "middle": [1], "uniform": [2]}[name]
    assert plan.strip().count("■") == 1


def test_a_count_of_layers_is_refused_where_heads_are_chosen():
    with pytest.raises(UserError, match="budget 2 counts layers, and heads are chosen one by one here"):
        heads().limit(Budget("layers", 2))


@pytest.mark.parametrize("kept", range(1, 6))
def test_a_count_of_heads_is_a_share(kept):
    assert heads().limit(heads().count(kept)) == layers().limit(layers().count(kept)) == kept


def test_every_plan_of_a_budget_is_there_once():
    space = bytes_of_cache()
    budget = Budget("kv", 300, 1024)
    found = {tuple(plan.assignments.values()) for plan in every_plan(space, budget)}
    costs = dict(zip(OPTIONS, space.cost[0], strict=True))
    fits = {plan for plan in itertools.product(OPTIONS, repeat=6) if sum(costs[option] for option in plan) <= 300}
    assert found <= fits and len(found) == len([*every_plan(space, budget)])
    assert count_plans(space, budget, 10_000) == len(found) and count_plans(space, budget, 5) == 6
    for plan in fits - found:  # Something dearer fits as well.
        room = 300 - sum(costs[option] for option in plan)
        assert any(0 < costs[more] - costs[option] <= room for option in plan for more in OPTIONS)
    counted = Space.of_layers(6)
    assert (
        count_plans(counted, Budget("layers", 2), 1)
        == math.comb(6, 2)
        == len([*every_plan(counted, Budget("layers", 2))])
    )


@pytest.mark.parametrize(
    "address", ["layers", "layers.x", "layers.1.heads.2", "model.layers.1", "layers.-1", "layers.03", "layers.٣", ""]
)
def test_what_is_no_group_is_refused(address):
    with pytest.raises(UserError, match="is no group: they are called layers.3, or layers.3.kv_heads.1"):
        Group(address)


class Layers:
    """As much of a morphable model as `select` looks at itself."""

    def space(self, budget: Budget) -> Space:
        return Space.of_layers(6)


@pytest.mark.parametrize("strategy", ["uniform", "first", "last"])
def test_a_strategy_that_asks_nothing_needs_no_objective(strategy):
    found = select(Layers(), "2", strategy)  # type: ignore[arg-type]
    assert len(found.plan.full_layers) == 2 and found.plan.strategy == strategy


def test_the_default_strategy_needs_an_objective():
    with pytest.raises(UserError, match="strategy budgeted-gates asks for losses: give an objective"):
        select(Layers(), "2")  # type: ignore[arg-type]
    found = select(Layers(), "2", objective=Additive(Space.of_layers(6)), steps=40)  # type: ignore[arg-type]
    assert found.plan.strategy == DEFAULT_STRATEGY and len(found.plan.full_layers) == 2


def test_what_a_user_should_know_is_logged_where_nobody_is_called(capsys, caplog):
    Search(layers(), BUDGET).say("exhaustive evaluates 100 % of the plans")
    assert caplog.messages == ["exhaustive evaluates 100 % of the plans"] and not capsys.readouterr().out


def test_a_new_strategy_is_one_function_and_its_record(monkeypatch):
    """As CONTRIBUTING.md says: what stands in its signature are its settings, and all commands know it."""
    from flashmorph.selection.strategy import Selection, Strategy, group_scores

    def odd(search: Search, offset: int = 1) -> Selection:
        """Every second layer."""
        space, budget = search.space, search.budget
        scores = group_scores(space, [float(row % 2 == offset) for row in range(len(space.groups))])
        return Selection(space.best(scores, budget), scores)

    monkeypatch.setitem(STRATEGIES, "odd", Strategy(odd, searches=False, asks_questions=False, seeded=False))

    found = select(Layers(), "3", "odd", Additive(Space.of_layers(6)), offset=0)  # type: ignore[arg-type]
    assert found.plan.full_layers == [0, 2, 4] and found.plan.strategy == "odd"
    with pytest.raises(UserError, match="strategy odd"):
        select(Layers(), "3", "odd", Additive(Space.of_layers(6)), ofset=0)  # type: ignore[arg-type]


class Noisy(Additive):
    """Every plan has a loss of its own, drawn; questions differ more than plans do."""

    def __init__(self, space: Space, seed: int):
        super().__init__(space)
        self.num_questions, self._seed, self._drawn, self._asked = 64, seed, {}, 0

    def losses(self, plan: Plan) -> np.ndarray:
        key = tuple(plan.assignments.values())
        if key not in self._drawn:
            rng = np.random.default_rng([self._seed, *map(self.space.options.index, key)])
            self._drawn[key] = rng.normal() + 2 * rng.normal(size=self.num_questions)
        return self._drawn[key]

    def loss(self, plan: Plan) -> float:
        return float(self.losses(plan).mean())

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        self._asked += 1
        assert self._asked < 1_000, "the search does not end"
        return np.array([self.losses(plan)[list(range(64) if questions is None else questions)] for plan in plans])


@pytest.mark.parametrize("seed", [379, 435, 1222])
def test_a_race_ends_where_its_winners_beat_each_other_in_a_circle(seed):
    space = Space.of_layers(4, OPTIONS)
    budget = Budget("layers", 1 + seed % 3)
    found = STRATEGIES["race"].run(search_on(space, budget, Noisy(space, seed)))
    assert space.cost_of(found.plan) == budget.limit


@pytest.mark.parametrize("strategy", ["greedy-forward", "greedy-backward", "race", "exhaustive"])
@pytest.mark.parametrize("seed", range(6))
def test_no_bytes_are_left_that_an_option_could_use(strategy, seed):
    rng = np.random.default_rng(seed)
    cost = np.stack([rng.integers(80, 120, 5), rng.integers(0, 5, 5), rng.integers(5, 60, 5)], 1).astype(float)
    space = Space(Space.of_layers(5, OPTIONS).groups, OPTIONS, cost)
    limit = float(rng.integers(cost[:, 1].sum() + 120, cost[:, 0].sum()))
    plan = STRATEGIES[strategy].run(search_on(space, Budget("kv", limit, 1024), Noisy(space, seed))).plan
    extra = cost - (space.one_hot(plan) * cost).sum(1, keepdims=True)
    assert space.cost_of(plan) <= limit and not ((extra > 0) & (space.cost_of(plan) + extra <= limit)).any()


def test_plans_of_bytes_are_counted_no_further_than_asked():
    rng = np.random.default_rng(0)
    space = Space(Space.of_layers(40).groups, (FULL, "linear"), rng.uniform([80, 0], [120, 5], size=(40, 2)))
    assert count_plans(space, Budget("kv", 700, 1024), 50) == 51
    with pytest.raises(UserError, match="would evaluate more than 50 plans of 40 groups .*: give a larger max_plans"):
        check_search("exhaustive", space, Budget("kv", 700, 1024), 12, {"max_plans": 50})


def test_options_of_one_letter_are_told_apart():
    plan = Plan.of(dict(zip(Space.of_layers(4).groups, [FULL, "sliding", "sparse", "linear"], strict=True)), BUDGET)
    assert plan.strip() == "■SPL"
