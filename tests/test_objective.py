"""The objective of a search on a real model, and every strategy on it."""

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_qwen3, tiny_tokenizer
from test_selection import BUDGETED, DESCENDING

from flashmorph.convert.in_memory import transplant
from flashmorph.data.heldout import HeldOut
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.model.morphable import Morphable, build
from flashmorph.plan import Budget
from flashmorph.selection import STRATEGIES, Search
from flashmorph.selection.distilling import Distiller
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.racing import start_questions
from flashmorph.selection.search import own_settings
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.selection.state import StateOnDisk
from flashmorph.selection.strategy import EACH_TASK
from flashmorph.stages import DistillSettings
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings


@pytest.fixture(scope="module")
def morphable() -> Morphable:
    model, _ = transplant(random_qwen3(vocab_size=len(tiny_tokenizer())))
    return Morphable(model)


def objective_on(
    morphable: Morphable,
    folder,
    text: torch.Tensor | None = None,
    micro_batch_tokens: int = 96,
    batch_tokens: int = 96,
    tasks: Sequence[dict[str, Any]] = ({"task": "many_keys", "num_keys": 1},),
    **more: Any,
):
    layout = Layout(tiny_tokenizer(), STYLES["lines"], Haystack.repeated())
    tasks = [TaskSettings.model_validate(task) for task in tasks]
    search = SearchSettings(length=96, batch_tokens=batch_tokens, micro_batch_tokens=micro_batch_tokens, questions=5)
    data = SearchData({"train": layout, "validation": layout}, STYLES["lines"], tasks, search)
    return MorphableObjective(
        morphable, data, folder, text=as_text(text), distiller=distiller(morphable, folder), **more
    )


def as_text(rows: torch.Tensor | None) -> HeldOut | None:
    """Each of `rows` as a document."""
    if rows is None:
        return None
    return HeldOut(rows.tolist(), list(range(len(rows))), [0] * len(rows), rows.shape[1], rows.numel())


def distiller(morphable: Morphable, folder) -> Distiller:
    """Trains on rows of random tokens."""

    def make_rows(settings: DistillSettings) -> Rows:
        path = folder / "rows.npy"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(0).integers(97, size=(settings.rows, settings.length)).astype(np.int32))
        return Rows(path)

    settings = DistillSettings(tokens=128, length=32, batch_tokens=64, learning_rate=1e-3)
    return Distiller(morphable, make_rows, settings, folder / "distilled")


@torch.no_grad()
def test_the_losses_of_a_plan_are_those_of_the_model_built_from_it(morphable, tmp_path):
    rows = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    objective = objective_on(morphable, tmp_path, rows)
    plan = morphable.space(Budget("layers", 1)).plan(["layers.1"], Budget("layers", 1))
    model = build(morphable, plan)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert objective.text_losses([plan])[0] == pytest.approx(expected, rel=1e-4)
    (losses,) = objective.evaluate([plan])
    for number, example in enumerate(objective._data.questions()):
        ids = torch.tensor([example.input_ids])
        marked = torch.tensor(example.is_answer)[1:]
        found = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1][marked], ids[0, 1:][marked])
        assert losses[number] == pytest.approx(found.item(), rel=1e-3)


UNEVEN = ({"task": "many_keys", "num_keys": 1}, {"task": "many_keys", "num_keys": 3, "num_asked": 3})
"""Answers of one number, and of three with the questions between them."""
GATES = torch.tensor([[0.7, 0.3], [0.2, 0.8]])


@pytest.mark.parametrize("loss", ["answers", "hidden"])
@pytest.mark.parametrize("data", ["questions", "text"])
def test_loss_and_gradient_do_not_depend_on_how_much_is_run_at_once(morphable, tmp_path, loss, data):
    found = []
    for number, micro in enumerate((96, 2 * 96, 3 * 96, 5 * 96)):
        objective = objective_on(morphable, tmp_path / str(number), None, micro, 5 * 96, UNEVEN)
        found.append(objective.gradient(GATES, 0, loss, data))
    assert len({sum(example.is_answer) for example in objective._data.batch(0)}) > 1
    value, gradient = found[0]
    assert gradient.abs().max() > 0
    for other, another in found[1:]:
        assert other == pytest.approx(value, rel=1e-4)
        torch.testing.assert_close(another, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_a_search_descends_what_plans_are_judged_by(morphable, tmp_path):
    """The loss of a plan's gates is the mean over questions of the losses that `evaluate` gives."""
    objective = objective_on(morphable, tmp_path, None, 2 * 96, 5 * 96, UNEVEN)
    objective._data.batch = lambda step, each_task: objective._data.questions()
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    for group in space.groups:
        plan = space.plan([group], budget)
        gates = torch.from_numpy(space.one_hot(plan)).float()
        value, _ = objective.gradient(gates, 0, "answers")
        assert value == pytest.approx(objective.evaluate([plan]).mean(), rel=1e-4)


def test_evaluations_are_run_once_then_read_from_disk_and_counted_by_every_search(morphable, tmp_path):
    rows = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    objective = objective_on(morphable, tmp_path, rows)
    plan = morphable.space(Budget("layers", 1)).plan(["layers.0"], Budget("layers", 1))
    text_loss = objective.text_losses([plan])[0]
    assert objective.cost.tokens_forward == rows.numel()
    assert objective.cost.flops > 0
    (some,) = objective.evaluate([plan], [3, 1])
    (every,) = objective.evaluate([plan])
    assert some.tolist() == [every[3], every[1]]
    assert objective.cost.tokens_forward == rows.numel() + 5 * 96
    again = objective_on(morphable, tmp_path, rows)
    assert (again.text_losses([plan])[0], again.evaluate([plan])[0].tolist()) == (text_loss, every.tolist())
    assert again.cost.tokens_forward == objective.cost.tokens_forward
    assert again.cost.flops == objective.cost.flops
    whole = objective_on(morphable, tmp_path / "other", rows, micro_batch_tokens=4096)
    assert whole.text_losses([plan])[0] == pytest.approx(text_loss, rel=1e-5)


def test_a_round_of_races_asks_every_task_however_long_the_rows(morphable, tmp_path, monkeypatch):
    """Of 16K tokens one row is a batch: the order of candidates would be that of one question, of one task."""
    tasks = [{"task": "many_keys", "num_keys": number} for number in (1, 2)]
    objective = objective_on(morphable, tmp_path, tasks=tasks)
    assert objective.num_tasks == 2 and [len(objective._data.batch(step)) for step in range(3)] == [1, 1, 1]
    asked: list[int] = []
    monkeypatch.setattr(objective._losses, "gradient", lambda gates, batch, loss: asked.append(len(batch)))
    objective.gradient(GATES, 1, "answers", EACH_TASK)
    objective.gradient(GATES, 1, "answers")
    assert asked == [2, 1] and [start_questions(tasks) for tasks in (1, 2, 3, 4, 5, 9)] == [4, 4, 6, 4, 5, 9]


def test_plans_share_text_as_they_share_questions(morphable, tmp_path):
    """The same losses together as one by one, for fewer products, which are the same again from disk."""
    rows = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    plans = [space.plan(groups, budget) for groups in (["layers.0"], ["layers.1"], ["layers.0", "layers.1"])]
    alone, together = objective_on(morphable, tmp_path / "alone", rows), objective_on(morphable, tmp_path / "all", rows)
    expected = [alone.text_losses([plan])[0] for plan in plans]
    shares: list[float] = []
    assert together.text_losses(plans, shares.append) == pytest.approx(expected, rel=1e-5)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) >= len(plans)
    assert together.cost.flops < alone.cost.flops
    again = objective_on(morphable, tmp_path / "all", rows)
    assert again.text_losses(plans[::-1]) == together.text_losses(plans)[::-1]
    assert again.cost.flops == together.cost.flops


def test_a_strategy_that_weighs_text_asks_for_it(morphable, tmp_path):
    with pytest.raises(UserError, match="this strategy weighs text too: give the objective validation text, `text`"):
        space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
        STRATEGIES["halo"].run(Search(space, budget, objective_on(morphable, tmp_path)))


@torch.no_grad()
def test_plans_run_together_share_what_they_have_in_common(tmp_path):
    model, _ = transplant(random_qwen3(vocab_size=len(tiny_tokenizer()), num_hidden_layers=4))
    morphable = Morphable(model)
    morphable.initialise(torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(2)))
    space, budget = morphable.space(Budget("layers", 2)), Budget("layers", 2)
    plans = [space.plan(full, budget) for full in itertools.combinations(space.groups, 2)]
    plans.append(plans[2])
    together, alone = (objective_on(morphable, tmp_path / name) for name in ("together", "alone"))
    losses = together.evaluate(plans)
    assert losses.shape == (7, 5)
    expected = np.concatenate([alone.evaluate([plan]) for plan in plans])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert np.ptp(losses[:6].mean(1)) > 1e-4
    # 0011, 0101, 0110, 1001, 1010, 1100 and 0110 again: 4 + 3 + 2 + 1 + 4 + 2 + 3 of 4 layers.
    tokens = 5 * 96
    assert together.cost.tokens_forward == pytest.approx(tokens * 19 / 4)
    assert alone.cost.tokens_forward == tokens * 6


def test_a_path_of_plans_is_trained_once_and_goes_on_from_its_last_weights(morphable, tmp_path, monkeypatch):
    runs: list[int] = []
    module = importlib.import_module("flashmorph.selection.distilling")
    really = module.distill
    monkeypatch.setattr(module, "distill", lambda *given: runs.append(1) or really(*given))
    rows = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    space = morphable.space(Budget("layers", 1))
    every, one = (space.plan(full, Budget("layers", 1)) for full in (space.groups, ["layers.1"]))
    objective = objective_on(morphable, tmp_path, rows)
    first = objective.distill([one], 3, answers=True)
    assert len(runs) == 1
    assert objective.text_losses([one])[0] != first.text_loss
    assert np.isfinite([first.kl, first.text_loss, *first.losses]).all()
    again = objective_on(morphable, tmp_path, rows)
    assert again.distill([one], 3, answers=True).losses.tolist() == first.losses.tolist()
    assert len(runs) == 1
    path = objective_on(morphable, tmp_path / "path", rows).distill([every, one], 3)
    assert path.text_loss != first.text_loss
    resumed = objective_on(morphable, tmp_path / "resumed", rows)
    resumed.distill([every], 3)
    before = len(runs)
    assert objective_on(morphable, tmp_path / "resumed", rows).distill([every, one], 3).kl == path.kl
    assert len(runs) == before + 1  # Only its last plan.


def test_losses_are_on_disk_while_plans_are_still_evaluated(morphable, tmp_path, monkeypatch):
    """So that `kill -9` loses no more than what was under way."""
    monkeypatch.setattr("flashmorph.selection.objective._WRITE_SECONDS", -1)
    space, seen = morphable.space(Budget("layers", 1)), []
    objective = objective_on(morphable, tmp_path, None)
    plan = space.plan(["layers.1"], Budget("layers", 1))
    objective.evaluate([plan], report=lambda share: seen.append(len([*tmp_path.glob("evaluations/*.json")])))
    assert seen[-1] == 1 and len(seen) > 1


def test_the_published_distance_is_its_formula(morphable, tmp_path):
    """The mean over layers and answer tokens of the squared distance, where an answer token is predicted."""
    objective = objective_on(morphable, tmp_path, None, 5 * 96, 5 * 96, UNEVEN)
    batch = objective._data.batch(0)
    ids = torch.tensor([example.input_ids for example in batch])
    marks = torch.tensor([example.is_answer for example in batch])
    full: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    with torch.no_grad():
        morphable(ids, observer=lambda layer, hidden, arguments, output: full.append(output))
        morphable(ids, GATES, observer=lambda layer, hidden, arguments, output: mixed.append(output))
    distances = [
        (one[:, :-1][marks[:, 1:]] - other[:, :-1][marks[:, 1:]]).square().mean()
        for one, other in zip(mixed, full, strict=True)
    ]
    assert objective.gradient(GATES, 0, "hidden")[0] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


def test_a_search_that_cannot_train_says_so(morphable, tmp_path):
    rows = torch.zeros(1, 40, dtype=torch.long)
    layout = Layout(tiny_tokenizer(), STYLES["lines"], Haystack.repeated())
    data = SearchData(
        {"train": layout, "validation": layout}, STYLES["lines"], [TaskSettings(task="hops")], SearchSettings(length=96)
    )
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    with pytest.raises(UserError, match="give the objective a distiller"):
        STRATEGIES["kl"].run(Search(space, budget, MorphableObjective(morphable, data, tmp_path, text=as_text(rows))))


def test_a_loss_that_is_not_finite_is_told_with_its_plan(tmp_path):
    model, _ = transplant(random_qwen3(vocab_size=len(tiny_tokenizer())))
    morphable = Morphable(model)
    next(iter(morphable.layers[1].branches["linear"].parameters())).data.fill_(math.nan)
    objective = objective_on(morphable, tmp_path, torch.randint(97, (2, 40)))
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    sound, broken = (space.plan([group], budget) for group in ("layers.1", "layers.0"))
    assert np.isfinite(objective.evaluate([sound])).all()
    for ask in (lambda: objective.evaluate([sound, broken]), lambda: objective.text_losses([broken])[0]):
        with pytest.raises(UserError, match="loss of the plan ■□ is not finite"):
            ask()
    with pytest.raises(UserError, match="is not finite at step 0"):
        STRATEGIES["budgeted-gates"].run(Search(space, budget, objective))


def test_gates_on_text_see_every_token(morphable, tmp_path):
    objective = objective_on(morphable, tmp_path)
    gates = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value, gradient = objective.gradient(gates, 0, "hidden", "text")
    assert value == 0 and gradient.isfinite().all()
    half = torch.full((2, 2), 0.5)
    text, questions = (objective.gradient(half, 0, "hidden", data)[0] for data in ("text", "questions"))
    assert text > 0 and text != questions
    with pytest.raises(UserError, match="data"):
        own_settings("gates", {"data": "both"})


def test_every_strategy_runs_on_a_model(morphable, tmp_path):
    rows = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    for name in BUDGETED:
        strategy = STRATEGIES[name].run
        settings = {"steps": 2} if name in (*DESCENDING, "kl") else {}
        objective = objective_on(morphable, tmp_path / (name if name in DESCENDING else "plans"), rows)
        selection = strategy(Search(space, budget, objective), **settings)
        assert len(selection.plan.full_layers) == 1
        assert np.isfinite(selection.scores).all()
        assert selection.plan == space.best(selection.scores, budget)


def test_what_a_search_kept_and_was_damaged_is_made_again(morphable, tmp_path):
    plan = morphable.space(Budget("layers", 1)).plan(["layers.1"], Budget("layers", 1))
    losses = objective_on(morphable, tmp_path).evaluate([plan])
    (kept,) = tmp_path.glob("evaluations/*.json")
    for path in (kept, tmp_path / "search_state.json"):
        path.write_text('{"step": 3')
    said: list[str] = []
    again = objective_on(morphable, tmp_path, say=said.append)
    assert np.array_equal(again.evaluate([plan]), losses)
    logits = torch.zeros(2)
    assert StateOnDisk(tmp_path, said.append).restore(logits, torch.optim.Adam([logits]), []) is None
    assert len(said) == 2 and all("making it again" in line for line in said)
