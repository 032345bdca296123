"""The best known plan of a budget: how it is found, within what it may cost, and how others are judged by it."""

import json
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import random_qwen3, run_command, small_morphable, tiny_tokenizer
from test_objective import objective_on
from test_selection import LAYERS, Surface, additive, chain_of_three, redundant_pair, twins

from flashmorph.convert.in_memory import transplant
from flashmorph.errors import UserError
from flashmorph.evaluation import paired_interval
from flashmorph.model.morphable import Morphable
from flashmorph.plan import Budget, Plan, Space, every_plan
from flashmorph.referee.best_known import BestKnown, found_once
from flashmorph.referee.capped import Capped, CapReached, Prices
from flashmorph.referee.finding import Found, find_best_known, local_optimum, plan_of, random_plans
from flashmorph.referee.settings import CompareSettings, for_a_found_reference
from flashmorph.referee.truth import find_truths
from flashmorph.selection import STRATEGIES
from flashmorph.selection.model_losses import ModelLosses
from flashmorph.selection.moves import one_swaps
from flashmorph.selection.state import StateOnDisk

PRICES = Prices(question=100, step=400)
MOST = 8_000_000
SPACE = Space.of_layers(LAYERS)


class Counting(Surface):
    """A surface that counts its tokens as the ledger of a model does."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.known: set[tuple[str, int]] = set()

    def gradient(self, gates, step, loss, data="questions"):
        self.cost.tokens_forward += (2 if loss == "hidden" else 1) * PRICES.step
        self.cost.tokens_backward += PRICES.step
        return super().gradient(gates, step, loss, data)

    def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
        for question in range(self.num_questions) if questions is None else questions:
            nodes = set()
            for plan in plans:
                key = str(plan.assignments)
                if (key, question) not in self.known:
                    options = list(plan.assignments.values())
                    nodes |= {tuple(options[: layer + 1]) for layer in range(len(options))}
            self.known |= {(str(plan.assignments), question) for plan in plans}
            self.cost.tokens_forward += PRICES.question * len(nodes) // len(plans[0].assignments)
        return super().evaluate(plans, questions, report)


def find(help, kept: int, most: int = MOST, seed: int = 0, **more) -> tuple[Found, Counting, list[str]]:
    objective, said = Counting(help), []
    budget = Budget("layers", kept)
    found = find_best_known(SPACE, budget, objective, PRICES, most, seed, say=said.append, **more)
    return found, objective, said


def layers_in(found: Found, kept: int) -> list[int]:
    return plan_of(found, Budget("layers", kept)).full_layers


@pytest.mark.parametrize("help", [additive, redundant_pair, twins, chain_of_three])
@pytest.mark.parametrize("kept", [2, 3, 4])
def test_on_a_small_space_the_best_known_plan_is_the_best(help, kept):
    found, objective, said = find(help, kept)
    every = [*every_plan(SPACE, Budget("layers", kept))]
    losses = objective.evaluate(every).mean(1)
    assert found.loss == pytest.approx(losses.min()) and found.ended and not found.left_out
    assert all(sentence.startswith("gates: ") for sentence in said)  # Of one start that is no choice.
    assert layers_in(found, kept) == every[int(losses.argmin())].full_layers
    assert found.loss <= min(found.starts.values()) == pytest.approx(found.starts[found.came_from])


def test_it_is_the_same_with_the_same_seed_and_starts_from_other_plans_with_another():
    one, again, other = (find(additive, 3, seed=seed)[0] for seed in (0, 0, 1))
    assert one == again and one.starts != other.starts


def test_the_local_search_goes_on_from_the_best_start():
    """With no start but random plans, swaps find the best plan of an additive surface, few of all plans judged."""
    space, budget = Space.of_layers(16), Budget("layers", 5)

    def help(full: torch.Tensor) -> torch.Tensor:
        return full @ torch.linspace(0.1, 3, 16)

    objective = Counting(help, layers=16)
    start = space.plan([f"layers.{layer}" for layer in range(5)], budget)
    capped = Capped(objective, space, PRICES, MOST)
    before = float(capped.evaluate([start]).mean())
    plan, loss, swaps, ended = local_optimum(space, start, before, 5, capped)
    assert plan.full_layers == [11, 12, 13, 14, 15] and ended and loss < before
    assert swaps == 5 and capped.plans_judged < 6 * len(one_swaps(space, start, 5))
    stopped = Capped(Counting(help, layers=16), space, PRICES, capped.spent // 2)
    plan, less, fewer, ended = local_optimum(space, start, before, 5, stopped)
    assert not ended and 0 < fewer < swaps and loss < less < before and stopped.spent <= capped.spent // 2


def test_a_winner_of_few_questions_must_be_better_on_all_of_them_and_does_not_come_back():
    """The first questions praise layer 0, all others layer 1; the races are as often won as there are false winners."""
    space, budget = Space.of_layers(3), Budget("layers", 1)
    raced: list[list[list[int]]] = []

    class Misleading(Surface):
        def evaluate(self, plans, questions=None, report=None) -> np.ndarray:
            raced.append([plan.full_layers for plan in plans])
            chosen = np.array(range(self.num_questions) if questions is None else questions)
            early = np.where(chosen < 8, 1.0, -1.0)
            rows = {0: -early, 1: 0 * early, 2: 5 + 0 * early}
            return np.array([3 + rows[plan.full_layers[0]] for plan in plans])

    capped = Capped(Misleading(additive, layers=3), space, PRICES, MOST)
    start = space.plan(["layers.1"], budget)
    plan, loss, swaps, ended = local_optimum(space, start, 3.0, 1, capped)
    assert (plan.full_layers, loss, swaps, ended) == ([1], 3.0, 0, True)
    assert raced[0] == [[1], [0], [2]] and raced[1] == [[0]] and raced[2] == [[1], [2]]


@pytest.mark.parametrize("most", [100_000, 160_000, 250_000, 500_000])
def test_it_takes_no_more_tokens_than_it_may(most):
    found, objective, said = find(chain_of_three, 3, most)
    spent = objective.cost.tokens_forward + 2 * objective.cost.tokens_backward
    assert found.tokens == spent <= most
    assert len(said) == len(found.left_out) and all("starts without" in sentence for sentence in said)
    assert found.loss <= min(found.starts.values())
    whole, *_ = find(chain_of_three, 3)
    assert whole.ended and whole.tokens > 250_000
    if most == 100_000:
        assert {"race", "greedy-forward"} <= set(found.left_out)


def test_too_few_tokens_to_compare_the_starts_are_refused():
    with pytest.raises(
        UserError, match="compares 23 plans on 40 questions of 100 tokens, 92,000 in all, and reference_t"
    ):
        find(additive, 2, 91_999)


def test_gates_are_left_out_where_there_are_more_than_two_options():
    space, said = Space.of_layers(LAYERS, ("full", "linear", "window")), []
    found = find_best_known(space, Budget("layers", 2), Counting(additive), PRICES, MOST, 0, say=said.append)
    assert found.left_out == ["gates"] and "starts without gates, which chooses between two" in said[0]
    assert {option for option in found.assignments.values()} >= {"full"}


def test_random_plans_spend_the_budget_and_differ():
    budget = Budget("layers", 3)
    plans = random_plans(SPACE, budget, random.Random(0), 20)
    assert len({tuple(plan.full_layers) for plan in plans}) == 20 == len(plans)
    assert all(len(plan.full_layers) == 3 for plan in plans)
    assert len(random_plans(Space.of_layers(3), Budget("layers", 1), random.Random(0), 20)) == 3
    counts = Counter(layer for plan in random_plans(SPACE, budget, random.Random(1), 50) for layer in plan.full_layers)
    assert set(counts) == set(range(LAYERS))
    cost = np.array([[5.0, 1.0], [3.0, 1.0], [4.0, 1.0], [2.0, 1.0]])
    space, bytes_of_cache = Space(tuple(SPACE.groups[:4]), ("full", "linear"), cost), Budget("kv", 9, 100)
    there = [plan.assignments for plan in every_plan(space, bytes_of_cache)]
    drawn = random_plans(space, bytes_of_cache, random.Random(0), 20)
    assert sorted(map(str, (plan.assignments for plan in drawn))) == sorted(map(str, there))
    for plan in drawn:
        assert all(each.assignments in there for each in one_swaps(space, plan, 9))


def test_neighbours_exchange_two_layers():
    plan = SPACE.plan(["layers.1", "layers.3"], Budget("layers", 2))
    expected = {tuple(sorted(({1, 3} - {out}) | {into})) for out in (1, 3) for into in set(range(LAYERS)) - {1, 3}}
    assert {tuple(each.full_layers) for each in one_swaps(SPACE, plan, 2)} == expected and len(expected) == 12
    space = Space.of_layers(3, ("full", "linear", "window"))
    plan = space.plan(["layers.0"], Budget("layers", 1))
    assert len(one_swaps(space, plan, 1)) == 2 + 2  # Layer 0 for another one, and a window for a linear layer.


def test_the_price_is_what_the_objective_counts(tmp_path):
    """Before it asks, and whatever was asked before."""
    morphable = small_morphable(vocab_size=len(tiny_tokenizer()), num_hidden_layers=4)
    objective, budget = objective_on(morphable, tmp_path), Budget("layers", 2)
    space = morphable.space(budget)
    plans = [space.plan(pair, budget) for pair in combinations(space.groups, 2)]
    capped = Capped(objective, space, Prices(96, 96), MOST)
    for some, questions in ((plans[:3], [0, 1]), (plans, [0, 1, 2]), (plans[2:], [2, 3])):
        before, price = capped.spent, capped.price(some, questions)
        capped.evaluate(some, questions)
        assert price > 0 and capped.spent - before == pytest.approx(price, abs=4)
    assert capped.price(plans[2:], [2, 3]) == 0 and capped.plans_judged == len(plans)
    capped.until = capped.spent + 4 * 96 - 1
    with pytest.raises(CapReached):
        capped.gradient(torch.ones(4, 2) / 2, 0, "hidden")
    capped.until += 1
    capped.gradient(torch.ones(4, 2) / 2, 0, "hidden")
    assert capped.spent == capped.until
    with pytest.raises(CapReached):
        capped.evaluate(plans, [4])


def test_an_interrupted_search_goes_on_from_what_is_on_disk(tmp_path, monkeypatch):
    morphable = Morphable(transplant(random_qwen3(vocab_size=len(tiny_tokenizer()), num_hidden_layers=4))[0])
    budget, prices = Budget("layers", 2), Prices(96, 96)

    def search(folder) -> Found:
        state = StateOnDisk(folder)
        return find_best_known(
            morphable.space(budget), budget, objective_on(morphable, folder), prices, 100_000, 0, state=state
        )

    whole = search(tmp_path / "whole")
    run, runs = ModelLosses.of_plans, []

    def killed_later(self, *arguments):
        runs.append(1)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(ModelLosses, "of_plans", killed_later)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed")
    assert search(tmp_path / "killed") == whole
    done = len(runs)
    assert search(tmp_path / "killed") == whole and len(runs) == done


def test_what_was_found_is_kept_and_made_again_where_it_is_damaged(tmp_path):
    path, said, made = tmp_path / "found.json", [], []
    found, *_ = find(additive, 2)

    def make() -> Found:
        made.append(1)
        return found

    assert found_once(path, make, said.append) == found_once(path, make, said.append) == found
    assert len(made) == 1 and not said
    kept = json.loads(path.read_text())
    for damage in ("{", "{}", json.dumps({**kept, "loss": "low"}), json.dumps({**kept, "loss": kept["loss"] - 1})):
        path.write_text(damage)
        assert found_once(path, make, said.append) == found
        assert str(path) in said[-1] and said[-1].endswith("making it again")
    assert len(made) == 5 and json.loads(path.read_text()) == kept


def test_regret_and_its_half_width_are_those_of_paired_questions():
    budget, objective = Budget("layers", 2), Surface(additive, num_questions=200, seed=5)
    best = SPACE.plan(["layers.1", "layers.3"], budget)
    assignments = {str(group): option for group, option in best.assignments.items()}
    found = Found(
        assignments=assignments, loss=1, came_from="race", starts={}, left_out=[], swaps=0, ended=True, tokens=1,
        plans_judged=1,
    )  # fmt: skip
    reference = BestKnown(budget, found, objective)
    assert (reference.regret(best), reference.half_width(best), reference.rank(best)) == (0, 0, None)
    for layers in ((1, 5), (0, 7)):
        plan = SPACE.plan([f"layers.{layer}" for layer in layers], budget)
        one, other = objective.evaluate([plan, best])
        assert reference.loss(plan) == pytest.approx(one.mean())
        assert reference.regret(plan) == pytest.approx((one - other).mean())
        low, high = paired_interval([one.tolist()], [other.tolist()])
        assert reference.half_width(plan) == pytest.approx((high - low) / 2)
        normal = 1.96 * (one - other).std(ddof=1) / np.sqrt(200)
        assert reference.half_width(plan) == pytest.approx(normal, rel=0.1)
        assert normal < 0.5 * 1.96 * one.std(ddof=1) / np.sqrt(200)
    worse = BestKnown(budget, found.model_copy(update={"assignments": dict(plan_with(0, 7).assignments)}), objective)
    assert worse.regret(best) < -2
    assert worse.to_dict()["best_known_loss"] == pytest.approx(worse.loss(plan_with(0, 7)))
    json.dumps(worse.to_dict())


def plan_with(*layers: int) -> Plan:
    return SPACE.plan([f"layers.{layer}" for layer in layers], Budget("layers", len(layers)))


def test_what_enumerates_is_refused_by_name_and_left_out_of_all():
    said: list[str] = []
    settings = for_a_found_reference(CompareSettings(reference="found"), said.append)
    assert set(STRATEGIES) - set(settings.strategies) == {"exhaustive"} and "exhaustive is left out" in said[0]
    few = CompareSettings(reference="found", strategies=("race", "exhaustive+max_plans=9"))
    with pytest.raises(UserError, match="strategy exhaustive.max_plans=9 evaluates every plan"):
        for_a_found_reference(few, said.append)
    with pytest.raises(UserError, match="by 128 questions at least and 20 are given: give --questions 128"):
        for_a_found_reference(CompareSettings(reference="found", questions=20), said.append)


def test_too_many_plans_are_refused_with_the_way_out():
    space = Space.of_layers(30)
    with pytest.raises(UserError, match="2,035,800 plans of 30 layers and max_plans is 2,000: .* --reference found"):
        find_truths(lambda budget: space, [Budget("layers", 7)], Surface(additive), 2_000)


def test_compare_judges_by_the_best_known_plan_and_goes_on(teacher_folder, recipe_file, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    arguments = ["compare", teacher_folder, "--recipe", recipe_file, "--output", run, "--budgets", "1", "--seeds", 1]
    arguments += ["--questions", 128, "--recall-questions", 0, "--strategies", "uniform,race"]
    assert run_command(*arguments, "--max-plans", 1) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "would evaluate 2 plans" in printed and "--reference found" in printed
    assert run_command(*arguments, "--max-plans", 1, "--strategies", "exhaustive+max_plans=1") == 2
    assert "--reference found" in " ".join(capsys.readouterr().err.split())
    assert not [*(run / "stages").iterdir()]
    arguments += ["--reference", "found"]
    assert run_command(*arguments, "--reference-tokens", 8_831) == 2
    assert "8,832 in all, and reference_tokens is 8,831" in " ".join(capsys.readouterr().err.split())
    arguments += ["--reference-tokens", 60_000]
    distilled = [*arguments, "--distill-steps", 2, "--distill-budget", "1"]
    assert run_command(*distilled) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "budget 1: best known" in printed and " best 0" not in printed and "rank" not in printed
    assert "the local search ended by itself" in printed
    summary = json.loads((run / "compare/compare.json").read_text())
    truth = summary["truths"]["1"]
    assert truth["reference"] == "found" and truth["plans_judged"] == 2 and 0 < truth["tokens"] <= 60_000
    assert all(cell["rank"] is None and cell["half_width"] >= 0 for cell in summary["cells"])
    for cell in summary["cells"]:
        assert cell["regret"] == pytest.approx(cell["loss"] - truth["best_known_loss"], abs=1e-6)
    assert summary["after_distillation"][0]["strategy"] == "best known"
    assert (run / "compare/regret.png").read_bytes()[:4] == b"\x89PNG"

    (kept,) = (path for path in run.glob("compare/*/reference/*.json"))
    kept.write_text("{")

    def no_run(*arguments):
        raise AssertionError("every loss is on disk")

    monkeypatch.setattr(ModelLosses, "of_plans", no_run)
    assert run_command(*distilled, "--json") == 0
    captured = capsys.readouterr()
    assert "making it again" in " ".join((captured.out + captured.err).split())
    shown = run_command(*arguments, "--kept")
    assert shown == 0 and "best known" in capsys.readouterr().out
    assert json.loads((run / "compare/compare.json").read_text())["truths"] == summary["truths"]
    assert run_command(*arguments, "--strategies", "exhaustive") == 2
    assert "strategy exhaustive evaluates every plan" in " ".join(capsys.readouterr().err.split())
