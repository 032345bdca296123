"""Budgets, the space of plans and the one operator that makes plans from scores."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from flashmorph.errors import UserError
from flashmorph.plan import FULL, PLAN_VERSION, Budget, Plan, Space

THREE = (FULL, "linear", "sliding")


def brute_force(space: Space, scores: np.ndarray, limit: float, exact: bool) -> float:
    """The largest summed score over all plans that keep to the limit."""
    rows = range(len(space.groups))
    best = -np.inf
    for chosen in itertools.product(range(len(space.options)), repeat=len(space.groups)):
        cost = sum(space.cost[row, option] for row, option in zip(rows, chosen, strict=True))
        if cost == limit if exact else cost <= limit:
            best = max(best, sum(scores[row, option] for row, option in zip(rows, chosen, strict=True)))
    return best


def spent(space: Space, plan: Plan) -> float:
    return float((space.one_hot(plan) * space.cost).sum())


def gained(space: Space, plan: Plan, scores: np.ndarray) -> float:
    return float((space.one_hot(plan) * scores).sum())


def bytes_space(rng: np.random.Generator, groups: int, options: tuple[str, ...], full: int) -> Space:
    """A space whose full layers cost different numbers of bytes, at least `full` each."""
    cost = np.stack([rng.integers(full, 4 * full, groups), *rng.integers(2**20, 2**24, (len(options) - 1, groups))], 1)
    return Space(tuple(f"layers.{group}" for group in range(groups)), options, cost.astype(float))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", Budget("layers", 7)),
        (7, Budget("layers", 7)),
        (" 7 ", Budget("layers", 7)),
        ("25%", Budget("share", 0.25)),
        ("12.5%", Budget("share", 0.125)),
        ("kv=64MiB@32768", Budget("kv", 64 * 2**20, 32768)),
        ("kv=1.5GB@4096", Budget("kv", 1.5e9, 4096)),
        ("kv=100KB@64", Budget("kv", 1e5, 64)),
        ("kv=3000B@64", Budget("kv", 3000, 64)),
    ],
)
def test_every_form_of_a_budget_is_read(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    "7 25% 12.5% 33.33333333% kv=64MiB@32768 kv=1.5GB@4096 kv=123456789B@8192 kv=3000B@64".split(),
)
def test_a_budget_can_be_read_from_its_own_text(text):
    budget = Budget.parse(text)
    again = Budget.parse(str(budget))
    assert (again.resource, again.context) == (budget.resource, budget.context)
    assert again.limit == pytest.approx(budget.limit, rel=1e-12)


BAD_BUDGETS = ("", "all", "-1", "0", "0%", "7.5", "25 %", "%", "kv=64MiB", "kv=64TiB@100", "kv=@100", "kv=0MiB@100")


@pytest.mark.parametrize("text", [*BAD_BUDGETS, "7\n8", "1e3", "kv=1MiB@", "layers=7", "0.25"])
def test_a_bad_budget_is_refused_in_one_sentence_that_shows_it(text):
    with pytest.raises(UserError, match="is none of|keeps nothing"):
        Budget.parse("9" * 5000 + text)
    with pytest.raises(UserError) as error:
        Budget.parse(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)
    assert "25%" in str(error.value)


@pytest.mark.parametrize(
    ("layers", "budget", "limit"),
    [(8, "25%", 2), (28, "25%", 7), (11, "25%", 2), (3, "25%", 1), (2, "1%", 1), (100, "29%", 29), (8, "7", 7)],
)
def test_a_share_is_rounded_down_and_at_least_one(layers, budget, limit):
    assert Space.of_layers(layers).limit(Budget.parse(budget)) == limit


@pytest.mark.parametrize("budget", ["8", "9", "100%", "150%"])
def test_a_budget_that_keeps_everything_is_refused(budget):
    with pytest.raises(UserError, match="everything full"):
        Space.of_layers(8).limit(Budget.parse(budget))


def test_a_budget_in_bytes_must_buy_one_full_layer_and_not_all():
    space = Space(("layers.0", "layers.1"), (FULL, "linear"), np.array([[100.0, 10.0], [70.0, 10.0]]))
    for text, problem in (("kv=79B@64", "below one full layer"), ("kv=170B@64", "everything full")):
        with pytest.raises(UserError, match=problem):
            space.limit(Budget.parse(text))
    assert space.limit(Budget.parse("kv=80B@64")) == 80
    assert space.limit(Budget.parse("kv=169B@64")) == 169


@pytest.mark.parametrize("text", ["loss=1%", "loss=0.5%", "loss="])
def test_a_tolerated_loss_is_no_budget_but_a_setting(text):
    with pytest.raises(UserError, match="a setting of the strategy `tolerance`, .*select.settings.tolerance=1%"):
        Budget.parse(text)


def test_a_space_whose_cost_has_another_shape_is_refused():
    with pytest.raises(ValueError, match="groups, options"):
        Space(("layers.0",), (FULL, "linear"), np.zeros((2, 2)))


@pytest.mark.parametrize("bad", [np.zeros((3, 2)), np.zeros((4, 3)), np.full((4, 2), np.nan), np.full((4, 2), np.inf)])
def test_scores_must_be_finite_and_fit_the_space(bad):
    with pytest.raises(ValueError, match="finite"):
        Space.of_layers(4).best(bad, Budget("layers", 2))


@pytest.mark.parametrize("options", [(FULL, "linear"), THREE], ids=len)
@pytest.mark.parametrize("seed", range(4))
def test_a_count_is_spent_exactly_and_nothing_scores_higher(options, seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 8))
    space = Space.of_layers(layers, options)
    scores = rng.normal(-1, 2, (layers, len(options)))
    for keep in range(1, layers):
        plan = space.best(scores, Budget("layers", keep))
        assert spent(space, plan) == keep == len(plan.full_groups)
        assert gained(space, plan, scores) == pytest.approx(brute_force(space, scores, keep, exact=True), abs=1e-9)


@pytest.mark.parametrize("full", [2**26, 2**30], ids=["64MiB", "1GiB"])
@pytest.mark.parametrize("seed", [*range(6), 14, 44, 125])
def test_bytes_are_spent_at_most_and_nothing_scores_higher(seed, full):
    """Limits one byte below, at and above what a plan costs: the knapsack must be exact to the byte."""
    rng = np.random.default_rng(seed)
    space = bytes_space(rng, int(rng.integers(3, 7)), THREE if seed % 2 else (FULL, "linear"), full)
    scores = rng.normal(0, 1, space.cost.shape)
    scores[:, 0] += 1
    chosen = rng.choice(len(space.groups), int(rng.integers(1, len(space.groups))), replace=False)
    cost = space.cost[:, 1:].min(1)
    cost[chosen] = space.cost[chosen, 0]
    smallest = space.cost.min(1).sum() + (space.cost.max(1) - space.cost.min(1)).min()
    for limit in (cost.sum() - 1, cost.sum(), cost.sum() + 1):
        if limit >= smallest:
            plan = space.best(scores, Budget("kv", limit, 4096))
            assert spent(space, plan) <= limit
            assert gained(space, plan, scores) == pytest.approx(brute_force(space, scores, limit, False), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_equal_bytes_everywhere_take_the_same_plan_as_the_knapsack(seed):
    rng = np.random.default_rng(seed)
    cost = np.tile([1000.0, 300.0], (6, 1))
    space = Space.of_layers(6)
    space = Space(space.groups, space.options, cost)
    scores = rng.normal(0, 1, (6, 2))
    for limit in range(2500, 5900, 333):
        plan = space.best(scores, Budget("kv", limit, 64))
        assert spent(space, plan) <= limit
        assert gained(space, plan, scores) == pytest.approx(brute_force(space, scores, limit, exact=False), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_two_options_at_one_cost_take_the_same_plan_as_the_knapsack(seed):
    """A third option that nobody would choose sends the same scores through the knapsack."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 1, (7, 2))
    for keep in (1, 3, 6):
        budget = Budget("layers", keep)
        plan = Space.of_layers(7).best(scores, budget)
        knapsack = Space.of_layers(7, THREE).best(np.column_stack([scores, np.full(7, -50.0)]), budget)
        assert plan.assignments == knapsack.assignments


@pytest.mark.parametrize("step", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("options", [(FULL, "linear"), THREE], ids=len)
def test_small_differences_beside_large_scores_still_decide(options, step):
    rng = np.random.default_rng(0)
    scores = 6.0 + rng.permutation(6 * len(options)).reshape(6, -1) * step
    space = Space.of_layers(6, options)
    plan = space.best(scores, Budget("layers", 2))
    assert gained(space, plan, scores) == pytest.approx(brute_force(space, scores, 2, exact=True), abs=step / 10)


def first_of_the_best(space: Space, scores: np.ndarray, limit: float, exact: bool) -> list[str]:
    """Of all plans that keep to the limit, in exact numbers: the best; of equals the first, group by group."""
    rest = [sorted(range(1, len(space.options)), key=lambda option: cost[option]) for cost in space.cost]
    best, found = None, None
    for chosen in itertools.product(*([0, *others] for others in rest)):
        cost = sum(Fraction(row[option]) for row, option in zip(space.cost, chosen, strict=True))
        total = sum(Fraction(row[option]) for row, option in zip(scores, chosen, strict=True))
        if (cost == limit if exact else cost <= limit) and (best is None or total > best):
            best, found = total, chosen
    assert found
    return [space.options[option] for option in found]


@pytest.mark.parametrize("options", [(FULL, "linear"), THREE, (*THREE, "none")], ids=len)
@pytest.mark.parametrize("seed", range(25))
def test_of_equal_plans_the_first_is_taken_with_any_number_of_options(options, seed):
    """Scores of few values, so that ties abound, and of sizes whose sums round in float64."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 6))
    scores = rng.integers(-1, 3, (layers, len(options))) * rng.choice([0, 1, 0.1, 1e-9, 1e12])
    counted = Space.of_layers(layers, options)
    cost = rng.integers(1, 5, (layers, len(options))) + np.array([6.0] + [0.0] * (len(options) - 1))
    priced = Space(counted.groups, options, cost)
    least = cost.min(1).sum() + (cost[:, 0] - cost.min(1)).min()
    budgets = [(counted, Budget("layers", kept)) for kept in range(1, layers)]
    budgets += [(priced, Budget("kv", limit, 64)) for limit in np.arange(least, cost[:, 0].sum(), 3)]
    for space, budget in budgets:
        expected = first_of_the_best(space, scores, budget.limit, budget.resource == "layers")
        assert list(space.best(scores, budget).assignments.values()) == expected


def test_sums_that_float64_rounds_differently_are_still_equal():
    scores = np.zeros((5, 3))
    scores[:, 0] = [0.3, 0.1, 0.3, 0.1, 0.3]
    assert Space.of_layers(5, THREE).best(scores, Budget("layers", 4)).full_layers == [0, 1, 2, 4]
    assert Space.of_layers(5, THREE).best(1e300 * scores, Budget("layers", 4)).full_layers == [0, 1, 2, 4]
    assert Space.of_layers(5, THREE).best(1e-300 * scores, Budget("layers", 4)).full_layers == [0, 1, 2, 4]


@pytest.mark.parametrize("costs", [(100, 40, 10), (100, 10, 40), (100, 10, 10)])
def test_everything_else_is_one_option_however_a_plan_is_made(costs):
    space = Space(tuple(f"layers.{layer}" for layer in range(5)), THREE, np.tile(np.array(costs, float), (5, 1)))
    budget = Budget("kv", 2 * 100 + 3 * 10 + 75, 64)
    best = space.best(np.zeros((5, 3)), budget)
    assert best.full_layers == [0, 1]
    assert best == space.plan(["layers.0", "layers.1"], budget)
    assert set(best.assignments.values()) == {FULL, "linear" if costs[1] == 10 else "sliding"}


@pytest.mark.parametrize(("full", "linear"), [(50, 80), (80, 80)])
def test_bytes_that_switching_does_not_save_are_refused_with_both_figures(full, linear):
    space = Space.of_layers(3)
    space = Space(space.groups, space.options, np.tile([float(full), float(linear)], (3, 1)))
    for limit in ("1B", "180B", "1GiB"):
        with pytest.raises(UserError, match=f"at 16 tokens .* takes {full}.0 B and of a linear one {linear}.0 B,"):
            space.limit(Budget.parse(f"kv={limit}@16"))


@pytest.mark.parametrize("keep", range(1, 5))
def test_ties_go_to_the_lower_layer(keep):
    assert Space.of_layers(5).best(np.zeros((5, 2)), Budget("layers", keep)).full_layers == list(range(keep))
    scores = np.array([[1.0, 0], [2, 0], [1, 0], [2, 0], [1, 0]])
    expected = {1: [1], 2: [1, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3]}
    assert Space.of_layers(5).best(scores, Budget("layers", keep)).full_layers == expected[keep]


def test_a_full_layer_is_scored_against_its_own_alternative():
    scores = np.array([[5.0, 4.9], [1.0, 0.0], [3.0, 2.5]])
    assert Space.of_layers(3).best(scores, Budget("layers", 1)).full_layers == [1]


def test_an_amount_that_no_plan_spends_is_refused():
    cost = np.array([[2.0, 0.0, 0.0]] * 3)
    space = Space(("layers.0", "layers.1", "layers.2"), THREE, cost)
    with pytest.raises(UserError, match="no plan spends exactly"):
        space.best(np.zeros((3, 3)), Budget("layers", 3))


def test_a_plan_as_gates_is_one_hot_by_name_and_not_by_place():
    space = Space.of_layers(4)
    plan = space.plan(["layers.1", "layers.3"], Budget("layers", 2))
    expected = [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert space.one_hot(plan).tolist() == expected
    turned = Plan(dict(reversed(plan.assignments.items())), plan.budget)
    assert space.one_hot(turned).tolist() == expected


@pytest.mark.parametrize(
    ("assignments", "names"),
    [
        ({f"layers.{layer}": FULL for layer in range(5)}, ["5 groups", "model 4"]),
        ({f"layers.{layer}": FULL for layer in range(3)}, ["3 groups", "model 4"]),
        ({f"layers.{layer + 1}": FULL for layer in range(4)}, ["layers.1, layers.2", "layers.0, layers.1"]),
        ({f"layers.{layer}": "mamba" for layer in range(4)}, ["layers.0", "mamba", "full, linear"]),
    ],
)
def test_a_plan_for_another_model_is_refused(assignments, names):
    with pytest.raises(UserError) as error:
        Space.of_layers(4).one_hot(Plan(assignments, Budget("layers", 1)))
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "group, sentence",
    [
        ("layers.30", "there is no 'layers.30'; the groups are layers.0 to layers.27; did you mean layers.3?"),
        ("embedding", "there is no 'embedding'; the groups are layers.0 to layers.27"),
    ],
)
def test_a_plan_by_hand_names_a_group_that_is_not_there(group, sentence):
    with pytest.raises(UserError) as error:
        Space.of_layers(28).plan(["layers.1", group], Budget("layers", 2))
    assert str(error.value) == sentence


@pytest.mark.parametrize("budget", ["2", "50%", "12.5%", "kv=64MiB@32768", "kv=1000000B@512"])
def test_a_plan_survives_its_file(tmp_path, budget):
    space = Space.of_layers(4)
    made = space.plan(["layers.0", "layers.3"], Budget.parse(budget))
    plan = Plan(
        made.assignments, made.budget, "greedy-forward", 7, "Qwen/Qwen3-0.6B", "abc", [{FULL: 0.5, "linear": 0.0}] * 4
    )
    plan.save(tmp_path / "new" / "plan.json")
    again = Plan.load(tmp_path / "new" / "plan.json")
    assert again == plan
    assert again.scores == plan.scores
    assert list(again.assignments) == list(plan.assignments)
    assert again.full_layers == [0, 3]
    assert again.strip() == "■□□■"


def plan_file(tmp_path, **changes):
    values = Space.of_layers(2).plan(["layers.0"], Budget("layers", 1)).to_dict()
    for name, value in changes.items():
        values = {**values, name: value} if value is not ... else {k: v for k, v in values.items() if k != name}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": PLAN_VERSION + 1}, f"version {PLAN_VERSION + 1}"),
        ({"version": ...}, "version None"),
        ({"assignments": ...}, "is no plan"),
        ({"assignments": ["full", "linear"]}, "is no plan"),
        ({"budget": ...}, "is no plan"),
        ({"budget": "much"}, "much"),
        ({"budget": 2}, "is no plan: budget: "),
        ({"seed": "one"}, "is no plan: seed: "),
        ({"seed": -1}, "is no plan: seed: "),
        ({"seed": True}, "is no plan: seed: "),
        ({"teacher": None}, "is no plan: teacher: "),
        ({"strategy": ["nll"]}, "is no plan: strategy: "),
        ({"scores": [{FULL: 1.0, "linear": 0.0}, "x"]}, "is no plan: scores.1: "),
        ({"scores": {"a": {"b": [1]}}}, "is no plan: scores: "),
        ({"assignments": {"layers.0": FULL, "layers.1": {"layers.2": FULL}}}, "is no plan: assignments.layers.1: "),
        ({"assignments": {"layers." + "9" * 5000: FULL}}, "is no plan: assignments.layers.9"),
        ({"version": "x" * 5000}, "version 'xxx"),
    ],
)
def test_a_file_that_is_no_plan_of_this_version_is_refused(tmp_path, changes, problem):
    with pytest.raises(UserError, match=problem) as error:
        Plan.load(plan_file(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ['{"version": 1, "version": 1}', '{"assignments": {"layers.0": "full", "layers.0": "linear"}}']
)
def test_a_file_that_says_one_thing_twice_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match="the key '.*' stands twice"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "3", "\x00\x01", '{"a": 1}', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"]
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def test_a_plan_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "plan.json", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            Plan.load(path)
