"""Frozen weights in bfloat16: half the memory, the same numbers."""

import copy

import pytest
import torch
from families import random_teacher
from test_packing import CASES, host_in

from flashmorph.model.frozen import frozen_dtype, narrow
from flashmorph.model.morphable import Morphable, attach
from flashmorph.plan import Budget
from flashmorph.stages import alignment_errors


def in_both(case: str) -> tuple[Morphable, Morphable]:
    """A morphable model whose frozen weights have the values of bfloat16: in float32, and in bfloat16."""
    model = copy.deepcopy(host_in(case)[0])
    model.config.dtype = torch.bfloat16
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    wide, _ = attach(model, ids(4, 48))
    narrowed = copy.deepcopy(wide)
    narrow(narrowed.model, True, [weight for each in narrowed.branch_parameters() for weight in each])
    return wide, narrowed


def ids(rows: int = 2, time: int = 40) -> torch.Tensor:
    return torch.randint(97, (rows, time), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
def test_results_are_the_same_to_the_last_bit(case):
    def results(morphable: Morphable) -> list[torch.Tensor]:
        gates = torch.full((len(morphable.layers), len(morphable.options)), 0.5, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            teacher, mixed = morphable(ids()), morphable(ids(), gates)
            errors = torch.tensor(alignment_errors(morphable, ids()) if morphable.branch_parameters()[0:1] else [])
            logits = morphable.model.lm_head(mixed)
        logits.float().square().mean().backward()
        return [teacher, mixed, errors, logits, gates.grad]

    wide, narrowed = in_both(case)
    for found, expected in zip(results(narrowed), results(wide), strict=True):
        assert found.dtype == expected.dtype
        if "moe" in case:  # Experts are multiplied in the dtype of their weights.
            assert (found - expected).float().norm() <= 0.1 * expected.float().norm()
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_what_trains_stays_in_float32(case):
    _, narrowed = in_both(case)
    assert all(weight.dtype == torch.float32 for each in narrowed.branch_parameters() for weight in each)
    trained = {id(weight) for each in narrowed.branch_parameters() for weight in each}
    frozen = [weight for weight in narrowed.parameters() if id(weight) not in trained]
    assert all(weight.dtype == (torch.bfloat16 if weight.ndim > 1 else torch.float32) for weight in frozen)


@pytest.mark.parametrize("case", CASES)
def test_a_model_built_from_it_is_in_float32_with_the_same_weights(case):
    wide, narrowed = in_both(case)
    budget = Budget("layers", 1)
    built, expected = (each.instantiate(each.space(budget).plan(["layers.0"], budget)) for each in (narrowed, wide))
    for name, weight in expected.state_dict().items():
        assert built.state_dict()[name].dtype == weight.dtype == torch.float32
        assert torch.equal(built.state_dict()[name], weight)


def test_it_is_narrow_only_where_products_are():
    config = random_teacher("llama: grouped").config
    for dtype, bf16, expected in (
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, True, torch.float16),
        (torch.bfloat16, False, torch.float32),
        (torch.float32, True, torch.float32),
    ):
        config.dtype = dtype
        assert frozen_dtype(config, bf16) == expected
