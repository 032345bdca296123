"""Choosing heads: counterfactual pairs, effects by patching, and the strategies made of them."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import random_teacher
from surfaces import Forgetful, search_on

from flashmorph.convert.in_memory import transplant
from flashmorph.errors import UserError
from flashmorph.losses import Head
from flashmorph.model.morphable import Morphable, attach
from flashmorph.plan import Plan, Space
from flashmorph.selection import STRATEGIES
from flashmorph.selection.effects import PairEffects
from flashmorph.selection.strategies.intervention import fused
from flashmorph.selection.strategy import Cost
from flashmorph.tasks import STYLES, Layout, TaskSettings
from flashmorph.tasks.counterfactual import Pair, make_pair
from flashmorph.tasks.haystack import Haystack

LENGTH = 256
TASKS = {
    "one key": TaskSettings(task="many_keys", num_keys=1),
    "eight keys": TaskSettings(task="many_keys", num_keys=8),
    "two asked": TaskSettings(task="many_keys", num_keys=4, num_asked=2),
    "hops": TaskSettings(task="hops", num_chains=2),
    "values": TaskSettings(task="many_values", num_values=2),
}


def pair_of(task: str, style: str = "lines", number: int = 0) -> Pair:
    tokenizer = tiny_tokenizer()
    hay = Haystack("\n".join(f"line {line} of a text that says nothing" for line in range(400)) + "\n")
    layout = Layout(tokenizer, STYLES[style], hay)
    pair = make_pair(TASKS[task], layout, STYLES[style], "train", LENGTH, 0, number)
    assert pair
    return pair


@pytest.mark.parametrize("style", ["lines", "prose"])
@pytest.mark.parametrize("task", TASKS)
def test_a_pair_differs_in_its_values_alone(task, style):
    tokenizer, pair = tiny_tokenizer(), pair_of(task, style)
    assert len(pair.clean) == len(pair.changed) == LENGTH
    differing = [place for place in range(LENGTH) if pair.clean[place] != pair.changed[place]]
    assert differing and max(differing) < min(pair.answers)
    answers = [pair.clean[place] for place in pair.answers]
    assert len(pair.others) == len(answers) and pair.others != answers
    last = pair.answers.index(next(place for place in pair.answers if place + 1 not in pair.answers)) + 1
    answer, other = (re.findall(r"\d+", tokenizer.decode(tokens[:last])) for tokens in (answers, pair.others))
    before, after = (tokenizer.decode(ids[: min(pair.answers)]) for ids in (pair.clean, pair.changed))
    assert answer and all(value in before and value not in after for value in answer)
    assert other and all(value in after and value not in before for value in other)


def supernet() -> Morphable:
    """Three layers of two key-value heads; the first head of the middle layer alone carries anything of size."""
    teacher = random_teacher("llama: grouped", 3, num_hidden_layers=3, vocab_size=len(tiny_tokenizer()))
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if "layers.0" in name and "o_proj" in name or "layers.2" in name and "o_proj" in name:
                weight.mul_(0.01)
            if "layers.1.self_attn.o_proj.weight" in name:
                weight[:, : weight.shape[1] // 2].mul_(40)
                weight[:, weight.shape[1] // 2 :].mul_(0.01)
    model, _ = transplant(teacher, {"mixers": "full,window", "window": 8})
    return attach(model, torch.randint(97, (2, 40)))[0]


def measured(morphable: Morphable, pair: Pair, groups: int) -> PairEffects:
    """Effects as shares of a readout that is large enough whatever a random model says of the pair."""
    with torch.no_grad():
        found = PairEffects(morphable, Head.of(morphable.model), pair, groups)
        if found._span < 0:
            found._span, found._readout, found._right, found._wrong = (
                -found._span,
                -found._readout,
                found._wrong,
                found._right,
            )
    return found


class TestEffects:
    @torch.no_grad()
    def test_the_same_text_in_place_of_itself_has_no_effect(self):
        pair = pair_of("one key")
        same = Pair(pair.clean, pair.clean, pair.answers, pair.others)
        found = measured(supernet(), same, 6)
        assert not found.counts
        found._span = 1.0
        assert found.receivers() == pytest.approx([0] * 6, abs=1e-5)
        assert found.senders([2, 3, 4, 5]) == pytest.approx([0] * 6, abs=1e-5)

    @torch.no_grad()
    def test_the_head_that_carries_the_answer_is_named(self):
        effects = measured(supernet(), pair_of("one key"), 6).receivers()
        assert int(np.argmax(effects)) == 2

    @torch.no_grad()
    def test_a_layer_is_all_of_its_heads(self):
        morphable, pair = supernet(), pair_of("one key")
        by_layer = measured(morphable, pair, 3).receivers()
        assert by_layer[1] == pytest.approx(measured(morphable, pair, 6).receivers()[2], abs=0.05)

    @torch.no_grad()
    def test_all_heads_of_the_last_layer_and_what_is_below_explain_everything(self):
        """Without attention held there is nothing left to explain: the last layer sees a changed text."""
        morphable, pair = supernet(), pair_of("one key")
        found = measured(morphable, pair, 3)
        found._clean.heads, found._changed.heads = found._changed.heads, found._clean.heads
        swapped = found._clean.after(0, found._clean.hidden[0][:, found._at], found._clean.attention(0, found._at))
        for layer in (1, 2):
            swapped = found._clean.after(layer, swapped, found._clean.attention(layer, found._at))
        assert found._shares(swapped) == pytest.approx([1.0], abs=1e-3)

    @torch.no_grad()
    def test_nothing_is_sent_to_receivers_below(self):
        sent = measured(supernet(), pair_of("one key"), 6).senders([0, 1])
        assert sent == [0.0] * 6


class Effects(Forgetful):
    """An objective that knows effects and nothing else."""

    def __init__(self, receivers: np.ndarray, senders: np.ndarray | None = None):
        self.cost, self.num_questions, self.warnings = Cost(), 4, []
        self._receivers, self._senders = receivers, senders
        self.asked: list = []

    def effects(self, groups, pairs, kind, receivers, report) -> np.ndarray:
        self.asked.append((kind, tuple(receivers)))
        if kind == "receiver":
            return self._receivers
        return np.zeros_like(self._receivers) if self._senders is None else self._senders


HEADS = Space.of_heads(4, 2)


def intervene(objective: Effects, kept: int = 3, **settings) -> Plan:
    search = search_on(HEADS, HEADS.count(kept), objective, say=objective.warnings.append)
    return STRATEGIES["intervention"].run(search, **settings).plan


def one_task(*effects: float) -> np.ndarray:
    return np.tile(effects, (1, 2, 1)).astype(float)


def test_receivers_and_senders_count_alike():
    receivers, senders = np.zeros(8), np.zeros(8)
    receivers[5], senders[2] = 0.4, 0.3
    objective = Effects(one_task(*receivers), one_task(*senders))
    assert intervene(objective, 2).in_short() == "1.0, 2.1"
    assert objective.asked[:3] == [("receiver", ()), ("sender", (5,)), ("sender", (2, 5))]


def test_an_effect_in_every_pair_is_worth_more_than_a_larger_one_in_some():
    receivers = np.zeros((1, 4, 8))
    receivers[0, :, 1] = 0.2
    receivers[0, 0, 6] = 0.9
    values = fused(receivers, np.zeros_like(receivers))
    assert values.argmax() == 1 and values[6] == pytest.approx(0.9 / 4 * 0.25 / 0.2)


def test_a_pair_that_measures_nothing_does_not_count():
    receivers = np.zeros((1, 2, 8))
    receivers[0, 0, 3], receivers[0, 1] = 0.5, np.nan
    assert fused(receivers, np.full_like(receivers, np.nan))[3] == 1.0


def test_a_pair_that_measures_nothing_counts_for_no_sender_either():
    """It has no receiver effects, so nobody asks for what is sent to them: no sender effect of 0."""
    receivers = np.stack([one_task(*[0] * 8)[0, 0], one_task(*[0] * 8)[0, 0]])[None]
    receivers[0, 0, 5], receivers[0, 1] = 0.6, np.nan
    senders = np.zeros_like(receivers)
    senders[0, 0, 2], senders[0, 1] = 0.5, np.nan
    objective = Effects(receivers, senders)
    search = search_on(HEADS, HEADS.count(2), objective, say=objective.warnings.append)
    selection = STRATEGIES["intervention"].run(search)
    assert selection.trace[0]["sender"][2] == 0.5 and selection.trace[0]["receiver"][5] == 0.6
    assert selection.plan.in_short() == "1.0, 2.1"


def test_each_task_counts_alike():
    receivers = np.zeros((2, 2, 8))
    receivers[0, :, 0], receivers[1, :, 7] = 0.9, 0.05
    assert fused(receivers, np.zeros_like(receivers))[[0, 7]].tolist() == [0.5, 0.5]


def test_groups_without_an_effect_are_spread_over_the_layers():
    objective = Effects(one_task(0, 0, 0, 0, 0.5, 0, 0, 0))
    plan = intervene(objective, 4)
    assert "2.0" in plan.in_short().split(", ")
    assert len({group.layer for group in plan.full_groups}) == 4
    assert objective.warnings == ["intervention: 1 of 8 heads have an effect; others are spread over the layers"]


def test_what_must_stay_stays():
    effects = one_task(0.9, 0.8, 0.7, 0, 0, 0, 0, 0)
    assert intervene(Effects(effects), 3, keep="3.1").in_short() == "0.0, 0.1, 3.1"
    assert intervene(Effects(effects), 3, keep="2").in_short() == "0.0, 2.0, 2.1"
    assert intervene(Effects(effects), 4, every_layer=True).in_short() == "0.0, 1.0, 2.0, 3.0"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": "9"}, "keep has '9', which is none of layers.0.kv_heads.0"),
        ({"keep": "1.7"}, "say 3 for a layer"),
        ({"keep": "0,1"}, "4 heads must stay full, more than budget heads=3"),
        ({"every_layer": True}, "4 heads must stay full"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        intervene(Effects(one_task(*[0.1] * 8)), 3, **settings)


@pytest.mark.parametrize("strategy", ["attribution", "intervention", "budgeted-gates"])
def test_the_whole_path_by_heads(strategy, tmp_path, recipe_file):
    """A random teacher through every stage, linear heads beside full ones; the report and the card say heads."""
    teacher = tmp_path / "teacher"
    random_teacher("llama: grouped", num_hidden_layers=3, vocab_size=len(tiny_tokenizer())).save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    run = tmp_path / "run"
    settings = [] if strategy != "attribution" else ["--set", "select.settings.steps=2"]
    if strategy == "intervention":
        settings = ["--set", "select.settings={}", "--set", "select.search.length=256"]
    code = run_command(
        "morph",
        teacher,
        "--recipe",
        recipe_file,
        "--budget",
        "heads=2",
        "--strategy",
        strategy,
        "--output",
        run,
        *settings,
    )
    if strategy == "intervention":
        # A random model prefers no answer, and says so.
        assert code == 2
        return
    assert code == 0
    plan = Plan.load(run / "plan.json")
    assert len(plan.full_groups) == 2 and len(plan.assignments) == 6
    assert set(plan.assignments.values()) == {"full", "linear"}
    config = json.loads((run / "config.json").read_text())
    assert sum(len(layer.get("full", [])) for layer in config["mixers"]) == 2
    assert "2 of 6 key-value heads keep full" in (run / "README.md").read_text()
    assert "The plan, head by head" in (run / "report.html").read_text()
    assert (run / "figures" / "heads.png").is_file()
