"""What learning the gates keeps in memory: two hidden states a layer at most, nothing of the vocabulary, no weights."""

import pytest
import torch
from conftest import small_morphable, tiny_tokenizer
from test_morphable import some_tokens
from torch.autograd.graph import saved_tensors_hooks

import flashmorph.losses as losses
import flashmorph.model.recompute
from flashmorph.data.corpus import Corpus
from flashmorph.model.morphable import Morphable
from flashmorph.selection.objective import MorphableObjective
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings

LENGTH = 96
FAMILIES = ["qwen3: grouped", "qwen3_moe: grouped", "llama: grouped"]


@pytest.fixture
def again(monkeypatch):
    """Layers run again in the backward, however small they are."""
    monkeypatch.setattr(flashmorph.model.recompute, "KEPT_BYTES", 0)


def half_gates(morphable: Morphable) -> torch.Tensor:
    return torch.full((len(morphable.layers), len(morphable.options)), 0.5, requires_grad=True)


def kept_bytes(morphable: Morphable, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps of one step of the gates, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in morphable.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = morphable(ids, half_gates(morphable)).square().mean()
    loss.backward()
    return sum(kept.values())


def growth(teacher: str, ids: torch.Tensor, **changes) -> float:
    """Bytes kept for each further layer, over those of a hidden state."""
    few, many = (kept_bytes(small_morphable(0, teacher, num_hidden_layers=layers, **changes), ids) for layers in (2, 5))
    return (many - few) / 3 / (4 * ids.numel() * 32)


@pytest.mark.parametrize("teacher", FAMILIES)
def test_a_layer_keeps_at_most_two_hidden_states(again, teacher):
    width = {"intermediate_size": 48} if "moe" not in teacher else {"moe_intermediate_size": 24}
    (name, value), ids = next(iter(width.items())), some_tokens(2, LENGTH)
    narrow, wide = (growth(teacher, ids, **{name: size}) for size in (value, 4 * value))
    assert 0.9 <= narrow <= 2
    assert wide == pytest.approx(narrow, abs=0.01)


def test_without_it_a_layer_keeps_its_inside():
    assert growth(FAMILIES[0], some_tokens(2, LENGTH)) > 10


def objective_on(morphable: Morphable, folder) -> MorphableObjective:
    style = STYLES["lines"]
    layout = Layout(tiny_tokenizer(), style, Haystack(Corpus().pool("train", 0)))
    tasks = [TaskSettings.model_validate({"task": "many_keys", "num_keys": 1})]
    search = SearchSettings(length=LENGTH, batch_tokens=2 * LENGTH, micro_batch_tokens=LENGTH, questions=2)
    data = SearchData({"train": layout, "validation": layout}, style, tasks, search)
    return MorphableObjective(morphable, data, folder)


@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("loss, data", [("answers", "questions"), ("answers", "text"), ("hidden", "questions")])
def test_loss_and_gradient_are_the_same_to_the_last_bit(monkeypatch, tmp_path, teacher, loss, data):
    morphable = small_morphable(0, teacher, vocab_size=len(tiny_tokenizer()))
    objective, gates = objective_on(morphable, tmp_path), half_gates(morphable).detach()
    expected = objective.gradient(gates, 0, loss, data)
    monkeypatch.setattr(flashmorph.model.recompute, "KEPT_BYTES", 0)
    found = objective.gradient(gates, 0, loss, data)
    assert found[0] == expected[0] and expected[1].abs().min() > 0
    assert torch.equal(found[1], expected[1])
    assert all(weight.grad is None and not weight.requires_grad for weight in morphable.parameters())
    assert "forward" not in vars(morphable.model.model.layers[0])


def test_logits_are_those_of_the_answers_and_a_chunk_at_a_time(again, monkeypatch, tmp_path):
    morphable = small_morphable(0, vocab_size=len(tiny_tokenizer()))
    objective, gates = objective_on(morphable, tmp_path), half_gates(morphable).detach()
    rows: list[int] = []
    really = losses.Head.of_weights

    def counted(head, hidden, *weights) -> torch.Tensor:
        rows.append(len(hidden))
        return really(head, hidden, *weights)

    monkeypatch.setattr(losses.Head, "of_weights", counted)
    objective.gradient(gates, 0, "answers")
    assert max(rows) < LENGTH / 4
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * len(tiny_tokenizer()) * 10)
    objective.gradient(gates, 0, "answers", "text")
    assert max(rows[2:]) == 10
