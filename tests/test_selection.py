"""What every strategy finds, on made-up loss surfaces whose best plans are known."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from surfaces import effects_like, search_on, within_bounds

from flashmorph.errors import UserError
from flashmorph.plan import Budget, Plan, Space
from flashmorph.selection import STRATEGIES, Cost, Search, Selection
from flashmorph.selection.racing import improve_by_swaps
from flashmorph.selection.search import check_search, own_settings, plan_without_search
from flashmorph.selection.shared_adam import SharedAdam
from flashmorph.selection.state import StateOnDisk
from flashmorph.selection.strategies.halo import halo_scores
from flashmorph.selection.strategies.l0 import hard_concrete, open_probability
from flashmorph.selection.strategy import Distilled, Swaps, group_scores

LAYERS = 8
BUDGETED = [name for name, strategy in STRATEGIES.items() if not strategy.finds_budget]
WEIGHTS = (0.2, 3.0, 0.1, 2.0, 0.05, 1.0, 0.4, 0.3)


def additive(full: torch.Tensor) -> torch.Tensor:
    return full @ torch.tensor(WEIGHTS)


def redundant_pair(full: torch.Tensor) -> torch.Tensor:
    """Layers 1 and 4 do the same thing, worth more than anything else."""
    either = 1 - (1 - full[:, 1]) * (1 - full[:, 4])
    return 3 * either + full[:, 6] + 0.5 * full[:, 2]


def twins(full: torch.Tensor) -> torch.Tensor:
    """Layer 4 does most of what layer 1 does; beside layer 1, layer 6 is worth more."""
    return 5 * (1 - (1 - full[:, 1]) * (1 - 0.9 * full[:, 4])) + 0.2 * full[:, 6] * full[:, 1]


def chain_of_three(full: torch.Tensor) -> torch.Tensor:
    """Layers 1, 3 and 6 help only all together; 0, 5 and 7 help a little alone."""
    return 5 * full[:, 1] * full[:, 3] * full[:, 6] + 0.3 * full[:, 0] + 0.1 * full[:, 5] + 0.2 * full[:, 7]


class Surface:
    """An objective whose loss is 6 nats minus `help` `[questions, layers] -> [questions]`, different a question.

    Each question weighs every layer in its own way and has a difficulty of its own. The hidden states' distance is made
    up by a gate that helps as the square of its distance to 1 falls.
    """

    num_tasks = 1

    def __init__(
        self, help: Callable, layers: int = LAYERS, num_questions: int = 40, noise: float = 0.1, seed: int = 0
    ):
        rng = np.random.default_rng(seed)
        self.help, self.noise, self.seed, self.num_questions = help, noise, seed, num_questions
        self.cost, self.asked, self.state, self.stop_after = Cost(), 0, None, math.inf
        self.distilled: list = []
        self.warnings: list[str] = []
        self._weights = self._draw(rng, num_questions, layers)
        self._difficulty = rng.exponential(size=num_questions)

    def gradient(
        self, gates: torch.Tensor, step: int, loss: str, data: str = "questions"
    ) -> tuple[float, torch.Tensor]:
        gates = gates.clone().requires_grad_(True)
        full = gates[:, 0] if loss == "answers" else 1 - (1 - gates[:, 0]) ** 2
        weights = self._draw(np.random.default_rng([self.seed, step]), 4, len(gates))
        value = (6 - self.help(full * weights)).mean()
        value.backward()
        assert gates.grad is not None
        return value.item(), gates.grad

    def effects(self, groups, pairs, kind, receivers, report) -> np.ndarray:
        alone = self.help(torch.eye(groups)).numpy()
        return effects_like(alone, groups, pairs)

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        chosen = list(range(self.num_questions) if questions is None else questions)
        self.asked += len(plans) * len(chosen)
        for share in (0.5, 1.0) if report else ():
            report(share)
        helps = torch.stack([self.help(self._full(plan) * self._weights[chosen]) for plan in plans])
        return (6 - helps).numpy() + self._difficulty[chosen]

    def distill(self, path, steps, answers=False) -> Distilled:
        """Training makes up for what a layer is worth, all but a share that falls with the steps."""
        lost = 6 - self.help(self._full(path[-1])[None])[0].item()
        added = lost - 6 + self.help(torch.ones(1, len(path[-1].assignments)))[0].item()
        self.distilled.append([plan.full_layers for plan in path])
        return Distilled(lost / steps, 2 + 0.02 * added, np.full(self.num_questions, lost / steps))

    def text_losses(self, plans, report=None) -> list[float]:
        """Text needs layer 1 most of all, and every other layer a little."""
        every = [1 - self._full(plan) for plan in plans]
        return [2 + 0.01 * switched.sum().item() + 0.3 * switched[1].item() for switched in every]

    def resume(self, cost) -> None:
        pass

    def restore(self, logits, optimizer, trace) -> tuple[int, Cost] | None:
        if self.state is None:
            return None
        step, kept, adam, entries = self.state
        with torch.no_grad():
            logits.copy_(kept)
        optimizer.state[logits] = copy.deepcopy(adam)
        trace[:] = copy.deepcopy(entries)
        return step, Cost()

    def keep(self, step, logits, optimizer, trace, cost) -> None:
        self.state = (step, logits.detach().clone(), copy.deepcopy(optimizer.state[logits]), copy.deepcopy(trace))
        if step >= self.stop_after:
            raise KeyboardInterrupt

    def _draw(self, rng: np.random.Generator, questions: int, layers: int) -> torch.Tensor:
        return torch.tensor(1 + self.noise * rng.standard_normal((questions, layers)), dtype=torch.float32)

    @staticmethod
    def _full(plan: Plan) -> torch.Tensor:
        return torch.tensor([float(option == "full") for option in plan.assignments.values()])


def search(strategy: str, objective: Surface, kept: int, seed: int = 0, layers: int = LAYERS, **settings) -> Selection:
    space, budget = Space.of_layers(layers), Budget("layers", kept)
    given = search_on(space, budget, objective, seed, say=objective.warnings.append, state=objective)
    return STRATEGIES[strategy].run(given, **settings)


def full_in(entry: dict) -> list[str]:
    return [group for group, option in entry["assignments"].items() if option == "full"]


def layers_of(strategy: str, help: Callable, kept: int, **settings) -> list[int]:
    return search(strategy, Surface(help), kept, **settings).plan.full_layers


DESCENDING = [name for name, strategy in STRATEGIES.items() if strategy.gradient_loss]
EVALUATING = ["add-one", "drop-one", "exhaustive", "greedy-backward", "greedy-forward", "nll", "race"]


@pytest.mark.parametrize("strategy", EVALUATING)
@pytest.mark.parametrize(("kept", "best"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 5])])
def test_the_best_plan_of_an_additive_surface_is_found_by_evaluation(strategy, kept, best):
    assert layers_of(strategy, additive, kept) == best


@pytest.mark.parametrize("strategy", DESCENDING)
def test_the_best_plan_of_an_additive_surface_is_found_by_descent(strategy):
    # Too low a penalty leaves the gates of all large layers at 1, where nothing tells them apart.
    settings = {"penalty": 0.5} if strategy == "gates" else {}
    assert layers_of(strategy, additive, 2, **settings) == [1, 3]


@pytest.mark.parametrize("penalty, warned", [(0.5, False), (50.0, True)])
def test_gates_that_are_all_closed_are_no_choice_and_it_says_so(penalty, warned):
    surface = Surface(additive)
    search("gates", surface, 2, penalty=penalty)
    assert any("0 of 8 gates stayed above 0 and the budget keeps 2" in each for each in surface.warnings) == warned


def test_steps_in_proportion_to_the_gradient_find_the_best_single_layer():
    for seed in range(5):
        selection = search("budgeted-gates", Surface(additive, seed=seed), 1, seed=seed, shared_moment=True)
        assert selection.plan.full_layers == [1]


def test_shared_adam_keeps_the_proportions_of_a_gradient():
    weight = torch.zeros(3, requires_grad=True)
    optimizer = SharedAdam([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.tensor([3.0, -1.0, 0.0])
        optimizer.step()
    expected = -3 * 0.1 * torch.tensor([3.0, -1.0, 0.0]) / math.sqrt(10 / 3)
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("strategy", ["budgeted-gates", "exhaustive", "greedy-backward", "greedy-forward", "race"])
def test_of_a_redundant_pair_one_layer_is_kept(strategy):
    settings = {"steps": 60} if strategy in DESCENDING else {}
    assert layers_of(strategy, redundant_pair, 1, **settings) in ([1], [4])
    assert layers_of(strategy, redundant_pair, 2, **settings) in ([1, 6], [4, 6])


def test_drop_one_misses_a_redundant_pair_and_add_one_keeps_both():
    assert layers_of("drop-one", redundant_pair, 2) == [2, 6]
    assert layers_of("add-one", redundant_pair, 2) == [1, 4]


@pytest.mark.parametrize("strategy", ["drop-one", "exhaustive", "greedy-backward", "l0"])
def test_a_chain_is_found_from_the_full_side(strategy):
    assert layers_of(strategy, chain_of_three, 3) == [1, 3, 6]


def test_random_budgets_find_the_chain_whatever_the_budget():
    selections = [
        search("budgeted-gates", Surface(chain_of_three), kept, steps=100, random_budget=True) for kept in (3, 5)
    ]
    assert selections[0].plan.full_layers == [1, 3, 6]
    assert set(selections[1].plan.full_layers) > {1, 3, 6}
    np.testing.assert_array_equal(selections[0].scores, selections[1].scores)


@pytest.mark.parametrize("seed", [2, 5])
def test_a_swap_at_the_end_parts_twins(seed):
    """Over all budgets both are worth much; only their plan tells that one is spare. With other seeds the logits do."""
    both = search("budgeted-gates", Surface(twins, seed=seed), 2, seed, swaps=0)
    assert both.plan.full_layers == [1, 4]
    objective = Surface(twins, seed=seed)
    parted = search("budgeted-gates", objective, 2, seed)
    assert parted.plan.full_layers == [1, 6]
    assert sorted(parted.scores[:, 0]) == sorted(both.scores[:, 0])
    assert objective.asked < math.comb(LAYERS, 2) * objective.num_questions / 2


@pytest.mark.parametrize("seed", range(4))
def test_swaps_mend_a_search_that_was_cut_short(seed):
    """One step says next to nothing; the races for both places find the best plan all the same."""
    assert search("budgeted-gates", Surface(additive, seed=seed), 2, seed, steps=1).plan.full_layers == [1, 3]


def test_any_layer_may_go_and_those_race_that_the_gradient_names():
    """All three layers are wrong, the best-scored one too; one round an exchange mends the plan."""
    space, budget, trace = Space.of_layers(LAYERS), Budget("layers", 3), []
    scores = group_scores(space, [3.0, 0, 2, 0, 1, 0, 0, 0])
    search = search_on(space, budget, Surface(additive), 0)
    mended = improve_by_swaps(search, scores, Swaps(3, candidates=2), 0, trace)
    assert space.best(mended, budget).full_layers == [1, 3, 5]
    assert len({frozenset(full_in(entry)) for entry in trace}) == 1 + 3 * 2


def test_rounds_of_swaps_end_when_two_in_a_row_change_nothing():
    few, many = Surface(additive), Surface(additive)
    for objective, swaps in ((few, 6), (many, 50)):
        assert search("budgeted-gates", objective, 2, swaps=swaps).plan.full_layers == [1, 3]
    assert few.asked == many.asked


@pytest.mark.parametrize("shared", [True, False])
def test_a_search_goes_on_from_its_file(tmp_path, shared):
    asked: list[int] = []

    class Stops(Surface):
        stop: int | None = None

        def gradient(self, gates, step, loss, data="questions"):
            asked.append(step)
            if step == self.stop:
                raise KeyboardInterrupt
            return super().gradient(gates, step, loss, data)

    def go(folder: Path, stop: int | None = None) -> Selection:
        folder.mkdir(exist_ok=True)
        objective = Stops(additive)
        objective.stop = stop
        given = search_on(Space.of_layers(LAYERS), Budget("layers", 2), objective, state=StateOnDisk(folder))
        return STRATEGIES["budgeted-gates"].run(given, swaps=0, shared_moment=shared)

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", 17)
    asked.clear()
    resumed = go(tmp_path / "killed")
    assert asked == list(range(10, 24)) and resumed.trace == whole.trace
    np.testing.assert_array_equal(resumed.scores, whole.scores)


@pytest.mark.parametrize("strategy", ["race", "budgeted-gates"])
def test_a_race_is_reported_while_it_asks(strategy):
    """Its rounds take minutes on long contexts: each batch of questions moves the bar, and none moves it back."""
    reports: list[tuple[float, float]] = []

    def report(done: float, total: float, **figures: float) -> None:
        within_bounds(done, total)
        reports.append((done, total))

    STRATEGIES[strategy].run(Search(Space.of_layers(LAYERS), Budget("layers", 2), Surface(twins), report=report))
    assert sum(done % 1 != 0 for done, _ in reports) >= 4
    assert all(now >= before for (before, total), (now, same) in itertools.pairwise(reports) if total == same)


@pytest.mark.parametrize("strategy", ["greedy-forward", "race", "add-one"])
def test_a_chain_is_invisible_from_the_empty_side(strategy):
    selection = search(strategy, Surface(chain_of_three), 3)
    assert selection.plan.full_layers == [0, 5, 7]
    losses = {tuple(full_in(entry)): entry["loss"] for entry in selection.trace if len(full_in(entry)) == 1}
    assert losses["layers.1",] == losses["layers.3",] == losses["layers.6",] > losses["layers.5",]


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [("first", [0, 1, 2]), ("last", [5, 6, 7]), ("middle", [2, 3, 4]), ("uniform", [2, 4, 7])],
)
def test_fixed_layouts(strategy, layers):
    plan = plan_without_search(strategy, Space.of_layers(LAYERS), Budget("layers", 3))
    assert plan.full_layers == layers and plan.strategy == strategy
    cache = Space(Space.of_layers(LAYERS).groups, ("full", "linear"), np.tile([100.0, 10.0], (LAYERS, 1)))
    plan = STRATEGIES[strategy].run(Search(cache, Budget("kv", 380, 1024))).plan
    assert plan.full_layers == layers


@pytest.mark.parametrize("strategy", BUDGETED)
def test_the_same_seed_finds_the_same(strategy):
    settings = {"steps": 10} if strategy in DESCENDING else {}
    first, second = (search(strategy, Surface(additive), 2, seed=3, **settings) for _ in range(2))
    assert first.plan == second.plan
    assert first.trace == second.trace
    np.testing.assert_array_equal(first.scores, second.scores)


@pytest.mark.parametrize("strategy", ["budgeted-gates", "l0"])
def test_another_seed_searches_differently(strategy):
    first, second = (search(strategy, Surface(additive), 2, seed=seed, steps=5) for seed in (0, 1))
    assert first.trace != second.trace


@pytest.mark.parametrize("strategy", [name for name in DESCENDING if name != "attribution"])
def test_a_killed_search_goes_on_where_it_stopped(strategy):
    whole = search(strategy, Surface(additive), 2, steps=12)
    killed = Surface(additive)
    killed.stop_after = 7
    with pytest.raises(KeyboardInterrupt):
        search(strategy, killed, 2, steps=12)
    killed.stop_after = math.inf
    resumed = search(strategy, killed, 2, steps=12)
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    assert resumed.trace == whole.trace


@pytest.mark.parametrize("strategy", ["add-one", "drop-one", "halo", "nll"])
def test_one_search_of_single_layers_serves_every_budget(strategy):
    few, many = (search(strategy, Surface(additive), kept) for kept in (1, 5))
    np.testing.assert_array_equal(few.scores, many.scores)


def test_scores_of_single_layers_are_differences_to_the_base():
    quiet = Surface(additive, noise=0)
    for strategy in ("add-one", "drop-one"):
        np.testing.assert_allclose(search(strategy, quiet, 2).scores[:, 0], WEIGHTS, atol=1e-6)


def test_nll_measures_what_add_one_and_drop_one_measure():
    for direction, strategy in (("restore", "add-one"), ("switch", "drop-one")):
        selection = search("nll", Surface(redundant_pair), 2, direction=direction)
        same = search(strategy, Surface(redundant_pair), 2)
        assert selection.plan == same.plan
        assert selection.trace == same.trace


def test_halo_scores_by_hand():
    # Best general .9 (the second layer, which divides by 1e-10), best recall .8 (the first layer).
    scores = halo_scores([0.5, 0.9, 0.8, 0.89], [0.8, 0.7, 0.4, 0.2])
    np.testing.assert_allclose(scores, [0.0, 50.0, 0.4 / 0.1, 50.0], rtol=1e-6)
    assert halo_scores([0.9], [0.3]) == [0.0]
    with pytest.raises(UserError, match="one general score and one recall a layer; got 2 and 1"):
        halo_scores([0.9, 0.8], [0.3])
    with pytest.raises(UserError, match="got 0 and 0"):
        halo_scores([], [])


def test_halo_keeps_what_recall_needs_and_text_does_not():
    surface = Surface(additive, noise=0)
    selection = search("halo", surface, 2)
    # Layer 1 matters most to recall but also to text; among the others text loses the same by each, so all reach the
    # highest general score and the cap, save layer 4, whose recall is the highest.
    values = selection.scores[:, 0]
    assert values[4] == 0
    assert 0 < values[1] < 50
    assert (np.delete(values, [1, 4]) == 50).all()
    assert {"assignments", "text_loss"} == set(selection.trace[0])
    assert {"assignments", "loss"} == set(selection.trace[-1])


def test_halo_always_keeps_the_layer_that_text_can_best_spare():
    """The published rule's artefact: that layer's ratio has next to nothing below the line."""
    surface = Surface(additive, noise=0)
    surface.text_losses = lambda plans, report: [2 + 0.1 * (1 - surface._full(plan))[1:].sum().item() for plan in plans]
    assert search("halo", surface, 3).plan.full_layers == [0, 1, 3]


RACE_WEIGHTS = torch.tensor(3 * 0.7 ** np.random.default_rng(0).permutation(12), dtype=torch.float32)


@pytest.mark.parametrize("seed", range(5))
def test_race_finds_greedy_forwards_plan_with_a_fifth_of_its_questions(seed):
    greedy, racing = (Surface(lambda full: full @ RACE_WEIGHTS, 12, 200, 0.5, seed) for _ in range(2))
    plan = search("greedy-forward", greedy, 3, layers=12).plan
    assert search("race", racing, 3, layers=12).plan == plan
    assert racing.asked <= greedy.asked / 5


def test_race_decides_on_all_questions_where_nothing_tells_candidates_apart():
    surface = Surface(lambda full: 0 * full.sum(1), noise=0)
    selection = search("race", surface, 2)
    assert selection.plan.full_layers == [0, 1]
    assert max(entry["questions"] for entry in selection.trace) == surface.num_questions


def test_race_mends_a_plan_by_one_swap():
    """Layer 0 looks best alone, but 1 and 2 together are better than it with any other."""

    def help(full: torch.Tensor) -> torch.Tensor:
        return 1.5 * full[:, 0] + full[:, 1] + full[:, 2] + 2 * full[:, 1] * full[:, 2] - 0.5 * full[:, 0] * full[:, 1]

    assert layers_of("race", help, 2, swaps=False) == layers_of("greedy-forward", help, 2) == [0, 2]
    assert layers_of("race", help, 2) == layers_of("exhaustive", help, 2) == [1, 2]


def test_race_works_with_a_single_question():
    assert layers_of("race", additive, 2, num_questions=1) == [1, 3]


def test_exhaustive_evaluates_every_plan_and_takes_the_best():
    selection = search("exhaustive", Surface(redundant_pair), 2)
    losses = {tuple(full_in(entry)): entry["loss"] for entry in selection.trace}
    assert len(losses) == math.comb(LAYERS, 2)
    assert losses[tuple(selection.plan.full_groups)] == min(losses.values())


def test_exhaustive_tells_how_many_plans_there_are():
    with pytest.raises(UserError) as error:
        search("exhaustive", Surface(additive, layers=28), 7, layers=28)
    assert "1,184,040 plans of 28 groups" in str(error.value)
    assert "give max_plans 1184040" in str(error.value)
    assert layers_of("exhaustive", additive, 2, max_plans=28) == [1, 3]


def test_exhaustive_warns_of_what_many_plans_cost():
    few, many = Surface(additive), Surface(chain_of_three, layers=12)
    search("exhaustive", few, 2)
    search("exhaustive", many, 3, layers=12)
    assert few.warnings == []
    assert many.warnings == ["exhaustive evaluates all 220 plans; greedy-forward would evaluate 33"]


def test_greedy_strategies_evaluate_each_candidate_once():
    forward, backward = Surface(additive), Surface(additive)
    assert len(search("greedy-forward", forward, 3, num_questions=10).trace) == 8 + 7 + 6
    assert len(search("greedy-backward", backward, 3, num_questions=10).trace) == 8 + 7 + 6 + 5 + 4
    assert (forward.asked, backward.asked) == (210, 300)


def test_greedy_scores_tell_the_order_of_choice():
    forward = search("greedy-forward", Surface(additive), 3).scores[:, 0]
    backward = search("greedy-backward", Surface(additive), 3).scores[:, 0]
    assert forward.tolist() == [0, 3, 0, 2, 0, 1, 0, 0]
    assert backward.tolist() == [2, 5, 1, 5, 0, 5, 4, 3]


def test_hard_concrete_gates_close_as_often_as_their_probability_says():
    log_alpha = torch.tensor([-3.0, -1.6, 0.0, 2.0])
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    gates = hard_concrete(log_alpha, torch.logit(uniform))
    assert gates.min() == 0 and gates.max() == 1
    torch.testing.assert_close((gates > 0).float().mean(0), open_probability(log_alpha), atol=0.01, rtol=0)


def test_l0_comes_to_spend_the_budget_by_itself():
    selection = search("l0", Surface(additive), 2, steps=200)
    opened = open_probability(torch.tensor(selection.trace[-1]["logits"][:LAYERS])).sum().item()
    assert opened == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("strategy", BUDGETED)
def test_bytes_of_cache_buy_as_many_layers_as_they_pay_for(strategy):
    """300 bytes are 80 for eight linear layers and 2 x 90 for two full ones; 40 are left over."""
    cache = Space(Space.of_layers(LAYERS).groups, ("full", "linear"), np.tile([100.0, 10.0], (LAYERS, 1)))
    settings = {"steps": 30} if strategy in DESCENDING else {}
    bytes_ = STRATEGIES[strategy].run(search_on(cache, Budget("kv", 300, 1024), Surface(additive)), **settings)
    assert len(bytes_.plan.full_layers) == 2 and bytes_.plan.budget.resource == "kv"
    if strategy not in ("budgeted-gates", "gates"):
        assert bytes_.plan.full_layers == search(strategy, Surface(additive), 2, **settings).plan.full_layers


@pytest.mark.parametrize("strategy", ["greedy-forward", "greedy-backward", "race"])
def test_where_layers_cost_differently_what_a_byte_gains_counts(strategy):
    cost = np.tile([100.0, 10.0], (LAYERS, 1))
    cost[1, 0] = 1_000
    space = Space(Space.of_layers(LAYERS).groups, ("full", "linear"), cost)
    plan = STRATEGIES[strategy].run(search_on(space, Budget("kv", 300, 1024), Surface(additive))).plan
    assert plan.full_layers == [3, 5]


@pytest.mark.parametrize("strategy", BUDGETED)
def test_a_budget_without_a_choice_is_refused_before_anything_is_spent(strategy):
    surface = Surface(additive)
    with pytest.raises(UserError, match="keeps everything full"):
        search(strategy, surface, LAYERS)
    assert surface.asked == 0


@pytest.mark.parametrize(
    ("strategy", "settings", "right"),
    [
        ("nll", {"direction": "up"}, "restore or switch"),
        ("gates", {"data": ["text"]}, "questions or text"),
        ("greedy-forward", {"num_questions": 0}, "a whole number at least 1 and at most 1,000,000 or null"),
        ("race", {"start_questions": 1}, "a whole number at least 2"),
        ("race", {"confidence": 2}, "a number above 0 and below 1"),
        ("race", {"swaps": 2}, "true or false"),
        ("budgeted-gates", {"swaps": -1}, "a whole number at least 0"),
        ("uniform", {"offset": -1}, "a whole number at least 0 or null"),
        *(("gates", {"penalty": value}, "a number at least 0") for value in (math.nan, math.inf, -1, True, None)),
        *(
            ("kl", {"steps": value}, "a whole number at least 1")
            for value in ("abc", 1.5, True, 1e21, -3, 0, [24], None)
        ),
        ("tolerance", {"steps": 10**5000}, "a whole number at least 1"),
        ("l0", {"learning_rate": "fast" * 1000}, "a number above 0"),
    ],
)
def test_a_setting_of_a_wrong_type_or_range_is_told_in_a_sentence(strategy, settings, right):
    with pytest.raises(UserError) as error:
        own_settings(strategy, settings)
    ((name, _),) = settings.items()
    assert f"strategy {strategy}: {name} must be {right}" in str(error.value) and "; got " in str(error.value)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_settings_are_what_the_signature_wants_and_defaults_are_among_them():
    for strategy in STRATEGIES:
        defaults = own_settings(strategy)
        assert own_settings(strategy, defaults) == defaults
        with pytest.raises(UserError, match=f"strategy {strategy} has no setting 'temperature'; it has "):
            own_settings(strategy, {"temperature": 1})
    read = own_settings("gates", {"learning_rate": "1e-3", "steps": "20", "penalty": 1})
    assert (read["learning_rate"], read["steps"], read["penalty"]) == (0.001, 20, 1)
    assert type(read["steps"]) is int and own_settings("nll", {"num_questions": None})["num_questions"] is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_held_against_its_budget_before_it_asks(strategy):
    space = Space.of_layers(LAYERS)
    check_search(strategy, space, Budget.parse("2"), 4, {})
    if STRATEGIES[strategy].finds_budget:
        return
    with pytest.raises(UserError, match="keeps everything full"):
        check_search(strategy, space, Budget.parse("8"), 4, {})


def test_what_only_space_and_budget_tell_is_told_before_a_question_is_asked():
    space = Space.of_layers(28)
    with pytest.raises(UserError, match="offset must be at most 3 for 7 of 28 layers; got 9"):
        check_search("uniform", space, Budget("share", 0.25), 4, {"offset": 9})
    with pytest.raises(UserError, match="would evaluate 1,184,040 plans"):
        check_search("exhaustive", space, Budget("layers", 7), 4, {})


THREE = ("full", "linear", "sliding")


@pytest.mark.parametrize("strategy", ["first", "last", "middle", "uniform"])
@pytest.mark.parametrize(("costs", "rest"), [((100, 40, 10), "sliding"), ((100, 10, 40), "linear"), (None, "linear")])
def test_fixed_layouts_give_everything_else_one_option(strategy, costs, rest):
    """The cheapest, of equals the first; also where bytes are left over that would pay for a dearer one."""
    space, budget = Space.of_layers(LAYERS, THREE), Budget("layers", 3)
    if costs:
        space = Space(space.groups, THREE, np.tile(np.array(costs, dtype=float), (LAYERS, 1)))
        budget = Budget("kv", 3 * 100 + 5 * 10 + 80, 1024)
    plan = STRATEGIES[strategy].run(Search(space, budget)).plan
    assert len(plan.full_layers) == 3
    assert {option for option in plan.assignments.values() if option != "full"} == {rest}
    assert plan.assignments == space.plan(plan.full_groups, budget).assignments


def test_kl_ranks_by_what_is_left_after_the_steps():
    surface = Surface(additive, noise=0)
    selection = search("kl", surface, 2, steps=4)
    assert selection.plan.full_layers == [1, 3]
    assert surface.distilled == [[[layer]] for layer in range(LAYERS)]
    assert selection.scores[1, 0] == pytest.approx((WEIGHTS[1] - min(WEIGHTS)) / 4)


def test_tolerance_switches_until_the_loss_is_spent():
    space = Space.of_layers(LAYERS)
    few, many = (
        STRATEGIES["tolerance"].run(search_on(space, Budget("layers", 1), Surface(additive, noise=0)), tolerance=share)
        for share in (0.06, 0.09)
    )
    assert (few.plan.full_layers, many.plan.full_layers) == ([1, 5, 7], [1])
    assert str(few.plan.budget) == "3"
    kept = [entry["layer"] for entry in few.trace if entry["kept"]]
    assert len(kept) == LAYERS - len(few.plan.full_layers)
    assert all(entry["perplexity_ratio"] <= 1.06 for entry in few.trace if entry["kept"])
    assert all(entry["perplexity_ratio"] > 1.06 for entry in few.trace if not entry["kept"])
    with pytest.raises(UserError, match="tolerance 0.01%: no layer can be switched within it; the mildest switch gave"):
        search("tolerance", Surface(additive), 2, tolerance=0.0001)


@pytest.mark.parametrize(("given", "share"), [("1%", 0.01), ("0.5 %", 0.005), (0.02, 0.02)])
def test_a_tolerance_is_a_share_or_a_percentage(given, share):
    assert own_settings("tolerance", {"tolerance": given})["tolerance"] == pytest.approx(share)


@pytest.mark.parametrize("given", ["x%", "0%", -1, 0, "%", True])
def test_what_is_no_share_is_no_tolerance(given):
    with pytest.raises(UserError, match="strategy tolerance: tolerance must be a number above 0"):
        own_settings("tolerance", {"tolerance": given})


def test_group_scores_fill_one_option():
    assert group_scores(Space.of_layers(2), [3.0, 4.0]).tolist() == [[3, 0], [4, 0]]
