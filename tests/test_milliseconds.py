"""Budgets in milliseconds: measured and estimated costs, plans within the limit, the time of what is built."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_qwen3, run_command

import flashmorph.bench.costs as costs_module
from flashmorph.bench import BenchSettings, measure_costs, source_here, time_tokens
from flashmorph.bench.costs import pair
from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_config
from flashmorph.devices import _cpu_model, device_name
from flashmorph.errors import UserError
from flashmorph.estimate import estimate, estimated_costs, find_gpu
from flashmorph.files import read_json, write_json
from flashmorph.hosts import configure, layer_space, shape_of
from flashmorph.own import CACHE
from flashmorph.plan import FULL, Budget, Costs, Group, Plan, Space, count_plans, every_plan
from flashmorph.recipe.outlook import check_recipe
from flashmorph.recipe.pricing import budget_of_recipe
from flashmorph.recipe.recipe import load_recipe

WINDOWS = {"host.mixers": "full,window", "host.window": 16}
RECIPE = {"evaluate.length": 256, "align.length": 256, "select.search.length": 256, "distill.length": 256}
LONG = {"max_position_embeddings": 65536}


def costs_of(rows: list[list[int]], options: tuple[str, ...], base: int = 1000, context: int = 64) -> Costs:
    groups = {Group(f"layers.{number}"): dict(zip(options, row, strict=True)) for number, row in enumerate(rows)}
    return Costs("random", "Host", "shape", context, {"kind": "estimated", "device": "GPU", "dtype": "float32"}, base,
                 groups)  # fmt: skip


def costs_for(config, settings: dict, source: dict, full: int, other: int, base: int, context: int = 64) -> Costs:
    """Costs of a teacher's groups: `full` microseconds of a full one, `other` of any other."""
    host, own = configure(config, settings)
    space = layer_space(host, own, Budget("heads" if host.by_head else "layers", 1))
    groups = {group: {option: full if option == FULL else other for option in space.options} for group in space.groups}
    return Costs("random", host.name, shape_of(host, own), context, source, base, groups)


@pytest.mark.parametrize("text", ["ms=4.2@32768", "ms=0.001@1", "ms=1.001@64", "ms=12@8192", "ms=0.0005@4096"])
def test_a_budget_in_milliseconds_is_read_and_written(text, tmp_path):
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget and str(budget) == text
    assert budget.is_time and budget.is_amount and not budget.is_share
    plan = Plan.of({"layers.0": FULL, "layers.1": "linear"}, budget)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").budget == budget


def test_a_limit_has_exactly_the_microseconds_that_it_was_given_in():
    for thousandths in range(1, 20_000, 7):
        assert Budget.parse(f"ms={thousandths / 1000:.3f}@64").limit == thousandths


@pytest.mark.parametrize("text", ["ms=0@64", "ms=4.2", "ms=@64", "ms=-1@64", "ms=1e3@64", "ms=4,2@64", "ms=4.2ms@64"])
def test_other_forms_are_refused(text):
    with pytest.raises(UserError, match=r"none of 7|above 0"):
        Budget.parse(text)


def test_seconds_become_whole_microseconds_rounded_up_and_never_negative():
    groups = [Group(f"layers.{layer}") for layer in range(4)]
    about = {"teacher": "", "host": "", "shape": "", "context": 64, "source": {}}
    costs = Costs.of_seconds(10e-6, {FULL: 0.0, "linear": -1.2e-6, "sliding": 0.5e-6}, groups, **about)
    assert costs.base == 6  # 10 - 4 * 1.2 = 5.2
    assert costs.groups[groups[0]] == {FULL: 2, "linear": 0, "sliding": 2}
    slower = Costs.of_seconds(10e-6, {FULL: 0.0, "linear": 3e-6}, groups, **about)
    assert slower.base == 10 and slower.groups[groups[3]] == {FULL: 0, "linear": 3}
    with pytest.raises(UserError, match="more --repeats"):
        Costs.of_seconds(10e-6, {FULL: 0.0, "linear": -3e-6}, groups, **about)


@pytest.mark.parametrize("seed", range(8))
def test_the_plan_is_the_best_of_all_within_the_limit(seed):
    """Against every combination of options; the part that no plan changes counts."""
    rng, options = np.random.default_rng(seed), (FULL, "linear", "sliding")
    rows = [[int(rng.integers(300, 900)), *map(int, rng.integers(0, 300, 2))] for _ in range(6)]
    costs = costs_of(rows, options)
    space = Space(tuple(costs.groups), options, costs.table(tuple(costs.groups), options))
    scores = rng.normal(size=space.cost.shape)
    worth, totals = {}, {}
    for chosen in itertools.product(range(3), repeat=6):
        totals[chosen] = 1000 + sum(row[option] for row, option in zip(rows, chosen, strict=True))
        worth[chosen] = sum(scores[group, option] for group, option in enumerate(chosen))
    least = 1000 + sum(min(row[1:]) for row in rows) + min(row[0] - min(row[1:]) for row in rows)
    most = 1000 + sum(row[0] for row in rows)
    for limit in (least, (least + most) // 2, most - 1):
        budget = Budget.parse(f"ms={limit / 1000:.3f}@64").priced(costs)
        plan = space.best(scores, budget)
        spent = costs.of(plan.assignments)
        assert spent == budget.base + space.cost_of(plan) <= limit
        best = max(value for chosen, value in worth.items() if totals[chosen] <= limit)
        assert math.isclose(float((space.one_hot(plan) * scores).sum()), best, abs_tol=1e-9)
        listed = [tuple(each.assignments.values()) for each in every_plan(space, budget)]
        fitting = {chosen for chosen in totals if totals[chosen] <= limit}
        roomy = {chosen for chosen in fitting if any(_dearer(chosen, rows, totals[chosen], limit))}
        assert sorted(listed) == sorted(tuple(options[number] for number in chosen) for chosen in fitting - roomy)
        assert count_plans(space, budget, 10_000) == len(listed)


def _dearer(chosen, rows, total, limit):
    for row, option in zip(rows, chosen, strict=True):
        yield from (other > row[option] and total + other - row[option] <= limit for other in row)


@pytest.mark.parametrize(
    ("rows", "limit", "says"),
    [
        ([[300, 100]] * 3, "1.499", "is below one full layer: with none full a token takes 1.300 ms and the smallest"),
        ([[300, 100]] * 3, "1.9", "keeps everything full: 1.900 ms of 1.900 ms"),
        ([[300, 400]] * 3, "2.0", "a linear layer takes 0.100 ms more than a full one, so that nothing is saved"),
        ([[300, 100], [0, 0], [300, 100]], "1.6", "takes as long as a full one, so that nothing is saved"),
    ],
)
def test_a_limit_that_leaves_no_choice_is_refused(rows, limit, says):
    costs = costs_of(rows, (FULL, "linear"))
    space = Space(tuple(costs.groups), (FULL, "linear"), costs.table(tuple(costs.groups), (FULL, "linear")))
    with pytest.raises(UserError, match=says):
        space.limit(Budget.parse(f"ms={limit}@64").priced(costs))


@pytest.mark.parametrize("settings", [{}, {"mixers": "full,window,thin", "window": 16}])
def test_estimated_costs_are_what_estimate_says(settings):
    config = random_qwen3(num_hidden_layers=4, **LONG).config
    recipe = load_recipe(
        "demo", {**RECIPE, "budget": "25%", **{f"host.{key}": value for key, value in settings.items()}}
    )
    gpu = find_gpu("a10")._replace(bandwidth=1e6)  # So slow that rounding is nothing.
    found = estimate("random", config, recipe, gpu, contexts=(4096,))
    costs = estimated_costs(found, 4096)
    host, own = configure(config, settings)
    assert set(costs.groups) == set(layer_space(host, own, Budget("heads" if settings else "layers", 1)).groups)
    assert costs.context == 4096 and not costs.measured and costs.origin == "estimated for NVIDIA A10"
    whole = found.seconds_per_token(found.sizes.host, found.cache[4096][0])
    assert whole
    rounding = len(costs.groups) + 1
    assert 0 <= costs.of(dict.fromkeys(costs.groups, FULL)) - 1e6 * whole <= rounding
    assert min(min(row.values()) for row in costs.groups.values()) == 0
    if not settings:
        hybrid = found.seconds_per_token(found.hybrid_parameters, found.cache[4096][1])
        assert hybrid
        options = [FULL, *["linear"] * 3]
        spent = costs.of(dict(zip(costs.groups, options, strict=True)))
        assert 0 <= spent - 1e6 * hybrid <= rounding
    with pytest.raises(UserError, match="name it, for example --gpu h100"):
        estimated_costs(replace(found, gpu=None), 4096)


def test_which_hybrids_are_timed():
    few, many = pair(Space.of_layers(4), "linear")
    assert (few.full_layers, many.full_layers) == ([0, 1, 2], [0])
    few, many = pair(Space.of_layers(2), "linear")
    assert (few.full_layers, many.full_layers) == ([0, 1], [0])
    few, many = pair(Space.of_heads(3, 2), "linear")
    assert [group for group in few.assignments if group not in few.full_groups] == [
        f"layers.{layer}.kv_heads.1" for layer in range(3)
    ]
    assert many.full_layers == [0] and len(many.full_groups) == 2
    assert pair(Space.of_heads(3, 2), "linear").between == 1
    assert pair(Space.of_heads(2, 2), "linear").between == 2


@pytest.fixture
def steady(monkeypatch):
    """Models run and are timed, and then the seconds are replaced: a busy machine would make any of them."""

    def timed(models, settings, report):
        measured = time_tokens(models, settings, report)
        assert all(len(tries) == settings.repeats and min(tries) > 0 for tries in measured.values())
        milliseconds = {"full": 5.0, "few": 6.0, "many": 5.5}
        return {name: [milliseconds[name.split()[0]] / 1000] * settings.repeats for name in models}

    monkeypatch.setattr(costs_module, "time_tokens", timed)


@pytest.mark.parametrize("settings", [{}, {"mixers": "full,window,dash", "window": 16}])
def test_measured_costs_have_every_group_of_the_host(settings, steady):
    teacher = random_qwen3(num_hidden_layers=4)
    model, _ = transplant(teacher, settings)
    shape = shape_of(*configure(teacher.config, settings))
    costs, figures = measure_costs(model, "random", BenchSettings(lengths=(32,), repeats=2, decode_tokens=2))
    host, own = configure(teacher.config, settings)
    space = layer_space(host, own, Budget("heads" if settings else "layers", 1))
    assert tuple(costs.groups) == space.groups and costs.measured and costs.context == 32
    assert costs.shape == shape, "what is measured on a loaded model fits a teacher that is only configured"
    assert costs.source == source_here(torch.device("cpu"), torch.float32)
    expected = {FULL, *(f"{size} {option}" for option in space.options[1:] for size in ("few", "many"))}
    assert set(figures["seconds"]) == expected
    # Layers: half a millisecond for 2 between 1 and 3 of 4. Heads: for 2 between 4 and 6 of 8.
    few = 4 if settings else 1
    row = {option: 250 if option == FULL else 0 for option in space.options}
    assert all(dict(each) == row for each in costs.groups.values())
    assert costs.base == 6000 + few * 250 - len(space.groups) * 250
    assert costs.of(pair(space, space.options[1]).few.assignments) == 6000
    assert costs.of(pair(space, space.options[1]).many.assignments) == 5500


def test_time_in_turns_leaves_caches_as_they_were():
    """Each turn goes on from the same context, with any mixer."""
    model, _ = transplant(random_qwen3(num_hidden_layers=4), {"mixers": "full,window,thin", "window": 16})
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given[CACHE].get_seq_length() if given.get(CACHE) is not None else 0),
        with_kwargs=True,
    )
    time_tokens({"model": model}, BenchSettings(lengths=(32,), repeats=2, decode_tokens=3))
    assert seen == [0, *[32, 33, 34] * 3]


def test_costs_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    config, file = random_qwen3(num_hidden_layers=4, **LONG).config, tmp_path / "costs.json"

    def refused(budget: str = "ms=1.3@64", given=config, **changes) -> str:
        recipe = load_recipe("demo", {**RECIPE, "budget": budget, **{"select.costs": str(file), **changes}})
        with pytest.raises(UserError) as error:
            check_recipe(given, recipe)
        assert "\n" not in str(error.value)
        return str(error.value)

    source = {"kind": "estimated", "device": "GPU", "dtype": "float32"}
    costs = costs_for(config, {}, source, 100, 0, 1000)
    missing = refused(**{"select.costs": None})
    assert "`flashmorph bench TEACHER --lengths 64 --costs costs.json`" in missing
    assert "`flashmorph estimate TEACHER" in missing and "select.costs=costs.json" in missing
    assert "cannot read" in refused()
    write_json(file, costs.to_dict())
    check_recipe(config, load_recipe("demo", {**RECIPE, "budget": "ms=1.3@64", "select.costs": str(file)}))
    assert Costs.load(file) == costs and Costs.load(file).digest == costs.digest
    assert "a context of 65 tokens and the costs about 64" in refused("ms=1.3@65")
    assert "those of Qwen3_5ForCausalLM with full, linear" in refused(**WINDOWS)
    assert "another shape (teacher random)" in refused(given=random_qwen3(**LONG).config)
    assert "another shape" in refused(**{"host.key_dim": 8})
    assert "below one full layer" in refused("ms=1.05@64") and "everything full" in refused("ms=1.4@64")
    write_json(file, {**costs.to_dict(), "microseconds": {"layers.0": {"full": -1, "linear": 0}}})
    assert "has no costs: microseconds.layers.0.full" in refused()
    write_json(file, {**costs.to_dict(), "microseconds": {"layers.0": {"full": 1.5, "linear": 0}}})
    assert "has no costs: microseconds.layers.0.full" in refused()
    write_json(file, {**costs.to_dict(), "microseconds": {"layer 0": {"full": 1, "linear": 0}}})
    assert "is no group" in refused()
    rows = costs.to_dict()["microseconds"]
    write_json(file, {**costs.to_dict(), "microseconds": {group: rows[group] for group in list(rows)[1:]}})
    assert "the costs are those of 3 groups and the model has 4: layers.0" in refused()
    write_json(file, {**costs.to_dict(), "version": 2})
    assert "costs of version 2" in refused()
    file.write_text("{}")
    assert 'it needs "microseconds"' in refused()


def test_costs_of_the_same_shape_fit_another_dtype_and_other_weights():
    config = random_qwen3().config
    one = shape_of(*configure(config))
    config.dtype = torch.bfloat16
    assert shape_of(*configure(config)) == one
    config.hidden_size *= 2
    assert shape_of(*configure(config)) != one


def test_the_commands_write_costs(teacher_folder, recipe_file, tmp_path, capsys, steady):
    file = tmp_path / "costs.json"
    measured = ("bench", teacher_folder, "--costs", file, "--lengths", 64, "--repeats", 1, "--decode-tokens", 1)
    assert run_command(*measured, "--recipe", recipe_file) == 0
    assert "--set select.costs=" in capsys.readouterr().out
    config = load_config(teacher_folder)
    space = layer_space(*configure(config), Budget("layers", 1))
    costs = Costs.load(file)
    assert tuple(costs.groups) == space.groups and costs.context == 64 and costs.base >= 0
    assert run_command(*measured, "--mixers", "full,window", "--set", "host.window=16", "--json") == 0
    heads = json.loads(capsys.readouterr().out)
    assert heads == read_json(file) and set(heads["microseconds"]["layers.1.kv_heads.1"]) == {"full", "window"}
    estimated = ("estimate", teacher_folder, "--recipe", recipe_file, "--gpu", "h100", "--contexts", 4096, "--costs")
    assert run_command(*estimated, file) == 2
    assert "not known as flashmorph's" in capsys.readouterr().err
    assert run_command(*estimated, file, "--force") == 0
    assert Costs.load(file).origin == "estimated for NVIDIA H100 SXM"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["bench", "tiny", "--costs", "FILE"], "give --lengths that of the budget"),
        (["bench", "tiny", "--costs", "FILE", "--lengths", "64,128"], "--costs is about one context"),
        (["bench", "tiny", "other", "--costs", "FILE", "--lengths", "64"], "about one teacher; got 2 models"),
        (["bench", "tiny", "--costs", "FILE", "--lengths", "4096"], "contexts of at most 512 tokens"),
        (["bench", "tiny", "--window", "16"], "--window is for --costs"),
        (["estimate", "tiny", "--costs", "FILE", "--contexts", "64"], "for example --gpu h100"),
        (["estimate", "tiny", "--costs", "FILE", "--gpu", "h100"], "give --contexts that of the budget"),
    ],
)
def test_what_the_commands_refuse(options, says, tmp_path, capsys):
    file = tmp_path / "costs.json"
    assert run_command(*(str(file) if option == "FILE" else option for option in options)) == 2
    assert says in capsys.readouterr().err and not file.exists()


def test_a_cpu_is_named_by_its_model(tmp_path):
    """Costs that were measured on one CPU are not those of another with as many threads."""
    assert device_name(torch.device("cpu")).startswith("cpu, ") and device_name(torch.device("meta")) == "meta"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert _cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert _cpu_model(tmp_path / "cpuinfo") == _cpu_model(tmp_path / "missing")


def test_a_search_spends_milliseconds_and_what_is_built_is_timed(teacher_folder, recipe_file, tmp_path, capsys):
    """Another content of the file is another search, the same one is not; a figure above the budget says so."""
    folder, file = tmp_path / "run", tmp_path / "costs.json"
    settings = {"mixers": "full,window", "window": 16}
    here = source_here(torch.device("cpu"), torch.float32)
    config = load_config(teacher_folder)
    options = ("--mixers", "full,window", "--set", "host.window=16", "--set", f"select.costs={file}")

    def build(costs: Costs, budget: str) -> tuple[str, list[Path]]:
        write_json(file, costs.to_dict())
        assert run_command("build", teacher_folder, "--recipe", recipe_file, "--output", folder, "--budget", budget,
                           *options) == 0  # fmt: skip
        return capsys.readouterr().out, sorted(folder.glob("stages/select-*"))

    costs = costs_for(config, settings, here, full=2, other=1, base=1)
    printed, searches = build(costs, "ms=0.007@64")
    (search,) = searches
    plan = Plan.load(search / "plan.json")
    assert plan.budget == Budget.parse("ms=0.007@64") and len(plan.full_groups) == 2
    assert costs.of(plan.assignments) == 7
    assert "above the budget of 0.007 ms" in printed and "this plan 0.007 ms by the costs (measured on cpu" in printed
    (timed,) = folder.glob("stages/timing-*")
    assert set(read_json(timed / "stage.json")["milliseconds"]) == {"teacher", "hybrid"}
    assert build(costs, "ms=0.007@64")[1] == searches
    printed, searches = build(replace(costs, base=2), "ms=0.007@64")
    assert len(searches) == 2 and len(list(folder.glob("stages/timing-*"))) <= 2
    wide = costs_for(config, settings, here, full=2_000_000_000, other=1_000_000_000, base=1)
    assert "within the budget of 7000000.000 ms" in build(wide, "ms=7000000@64")[0].replace(",", "")
    elsewhere = replace(costs, source={"kind": "estimated", "device": "NVIDIA H100 SXM", "dtype": "bfloat16"})
    printed, _ = build(elsewhere, "ms=0.007@64")
    assert "not timed here, takes 0.007 ms by the costs (estimated for NVIDIA H100 SXM) of 0.007 ms" in printed
    morph = ("morph", teacher_folder, "--recipe", recipe_file, "--output", folder, "--budget", "ms=0.007@64", *options)
    assert run_command(*morph) == 0
    timing = read_json(folder / "results.json")["timing"]
    assert timing == {
        "context": 64,
        "limit": 0.007,
        "by_costs": 0.007,
        "origin": "estimated for NVIDIA H100 SXM",
        "hybrid": None,
        "teacher": None,
    }
    assert "for the budget ms=0.007@64" in (card := (folder / "README.md").read_text()) and "not timed here" in card
    assert "A token after 64 others, not timed here, takes 0.007 ms" in (folder / "report.html").read_text()
    results = read_json(folder / "results.json")
    write_json(folder / "results.json", {**results, "timing": {**timing, "hybrid": 0.5, "teacher": 0.25}})
    assert run_command("report", folder) == 0
    page = (folder / "report.html").read_text()
    assert "budget 0.007 ms, teacher 0.250 ms" in page and "takes 0.500 ms, above the budget of 0.007 ms" in page
    write_json(folder / "results.json", {**results, "timing": {**timing, "hybrid": 0.5}})
    capsys.readouterr()
    assert run_command("report", folder) == 2 and "timed together" in capsys.readouterr().err
    assert run_command(*morph, "--dry-run", "--json") == 0
    (row,) = (each for each in json.loads(capsys.readouterr().out) if each["stage"] == "timing")
    assert row["data"].startswith("a token after 64")
    recipe = load_recipe(recipe_file, {"budget": "ms=0.007@64", "select.costs": str(file), "host": settings})
    assert budget_of_recipe(config, recipe).costs == elsewhere


def test_the_cost_of_a_run_within_milliseconds_is_estimated(tmp_path, capsys):
    file = tmp_path / "costs.json"
    costs = ("estimate", "tiny", "--gpu", "h100", "--contexts", "256", "--costs", file)
    assert run_command(*costs) == 0
    limit = 1.01 * read_json(file)["base_microseconds"] / 1000 + 0.002
    capsys.readouterr()
    assert run_command("estimate", "tiny", "--recipe", "demo", "--budget", f"ms={limit:.3f}@256", "--set",
                       f"select.costs={file}", "--json") == 0  # fmt: skip
    assert "timing" in [stage["stage"] for stage in json.loads(capsys.readouterr().out)["stages"]]


def test_strategies_are_compared_within_milliseconds(teacher_folder, recipe_file, tmp_path, capsys):
    folder, file = tmp_path / "run", tmp_path / "costs.json"
    source = {"kind": "estimated", "device": "NVIDIA H100 SXM", "dtype": "bfloat16"}
    config, settings = load_config(teacher_folder), {"mixers": "full,window", "window": 16}
    made = ("--set", "host.mixers=full,window", "--set", "host.window=16", "--set", f"select.costs={file}")
    asked = ("--budgets", "ms=0.007@64", "--strategies", "nll,uniform", "--seeds", 1, "--questions", 4)
    compare = ("compare", teacher_folder, "--recipe", recipe_file, "--output", folder, *asked, *made)
    plans = []
    for full in (2, 3):
        write_json(file, costs_for(config, settings, source, full=full, other=1, base=1).to_dict())
        assert run_command(*compare) == 0
        cells = [json.loads(line) for line in (folder / "compare/cells.jsonl").read_text().splitlines()]
        assert len(cells) == 2 and all(cell["rank"] >= 1 for cell in cells), "none of other costs is kept"
        plans.append({sum(option == FULL for option in cell["assignments"].values()) for cell in cells})
    assert plans == [{2}, {1}]
    capsys.readouterr()
