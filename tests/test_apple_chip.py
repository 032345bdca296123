"""What an Apple chip's device lacks or keeps, on tensors of the CPU that behave as its own do."""

import pytest
import torch
from conftest import random_qwen3, small_morphable
from test_objective import objective_on

from flashmorph.data.heldout import Batch, HeldOut
from flashmorph.devices import release_memory
from flashmorph.evaluation.perplexity import text_losses
from flashmorph.plan import Budget


class OnTheChip(torch.Tensor):
    """Refuses float64, in the words of MPS, until it is copied to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), settings=None):
        if function is torch.Tensor.cpu:
            return arguments[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, arguments, settings or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


@pytest.fixture
def losses_on_the_chip(monkeypatch):
    """Losses of text as a model on such a device gives them."""
    losses = Batch.losses
    monkeypatch.setattr(Batch, "losses", lambda *of: losses(*of).as_subclass(OnTheChip))
    with pytest.raises(TypeError, match="MPS"):
        torch.ones(2).as_subclass(OnTheChip).double()


def test_perplexity_needs_no_float64_of_the_device(losses_on_the_chip):
    text = HeldOut([[1, 2, 3, 4], [5, 6, 7]], [0, 1], [0, 0], 4, 7)
    assert (text_losses(random_qwen3(), text) > 0).all()


def test_a_search_needs_no_float64_of_the_device(losses_on_the_chip, tmp_path):
    objective = objective_on(small_morphable(), tmp_path, torch.randint(97, (2, 24)))
    budget = Budget("layers", 1)
    space = small_morphable().space(budget)
    assert objective.text_losses([space.plan(["layers.0"], budget)])[0] > 0


def test_what_the_device_keeps_is_given_back(monkeypatch):
    given_back = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: given_back.append("mps"))
    release_memory(torch.device("mps"))
    assert given_back == ["mps"]
