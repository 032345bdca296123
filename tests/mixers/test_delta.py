"""Gated DeltaNet and Mamba2 by head: their forms are one, and the delta rule is transformers'."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5

from flashmorph.own.delta_flashmorph import GatedDeltaNet
from flashmorph.own.linear_flashmorph import Linear
from flashmorph.own.mamba2_flashmorph import Mamba2
from flashmorph.own.states_flashmorph import chunked


def inputs(heads: int = 2, groups: int = 2, time: int = 50) -> list[torch.Tensor]:
    """Queries, keys of length 1, values, rates and strengths."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads * groups, time, 6, generator=generator)
    k = F.normalize(torch.randn(2, heads, time, 6, generator=generator), dim=-1)
    v = torch.randn(2, heads, time, 5, generator=generator)
    rates, strengths = torch.rand(2, 2, heads, time, generator=generator)
    return [q, k, v, 0.3 * rates, strengths]


def test_the_delta_rule_in_chunks_is_that_token_by_token():
    q, k, v, rates, strengths = inputs()
    found, last = chunked(q, k, v, rates, None, 2, 16, strengths)
    state, steps = torch.zeros(2, 2, 6, 5), []
    for t in range(q.shape[2]):
        state = state * torch.exp(-rates[:, :, t])[..., None, None]
        missing = v[:, :, t] - torch.einsum("bhf,bhfv->bhv", k[:, :, t], state)
        state = state + torch.einsum("bh,bhf,bhv->bhfv", strengths[:, :, t], k[:, :, t], missing)
        steps.append(torch.einsum("bhgf,bhfv->bhgv", q.unflatten(1, (2, 2))[:, :, :, t], state).flatten(1, 2))
    assert torch.allclose(found, torch.stack(steps, 2), atol=1e-5)
    assert torch.allclose(last, state, atol=1e-5)


def test_the_delta_rule_is_transformers_own():
    q, k, v, rates, strengths = inputs(groups=1)
    found, last = chunked(q, k, v, rates, None, 1, 16, strengths)
    reference = modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__
    tensors = [each.transpose(1, 2) for each in (q * q.shape[-1] ** 0.5, k, v, -rates, strengths)]
    output, state = reference(*tensors, output_final_state=True)
    assert torch.allclose(found, output.transpose(1, 2), atol=1e-5)
    assert torch.allclose(last, state, atol=1e-5)


def test_a_key_reads_back_what_it_wrote_last():
    q, k, v, rates, _ = inputs(groups=1, time=6)
    k = torch.eye(6)[[0, 1, 0, 2, 1, 0]].expand(2, 2, -1, -1)
    found, _ = chunked(k, k, v, 0 * rates, None, 1, 4, torch.ones(2, 2, 6))
    assert torch.allclose(found, v, atol=1e-6)
    plain, _ = chunked(k, k, v, 0 * rates, None, 1, 4)
    assert torch.allclose(plain[:, :, 5], v[:, :, [0, 2, 5]].sum(2), atol=1e-6)


@pytest.mark.parametrize("kind", [GatedDeltaNet, Mamba2])
def test_all_weights_learn_and_belong_to_one_head(kind):
    torch.manual_seed(0)
    mixer = kind(3, 2, 8, 24)
    mixer.reset()
    q, k, v = torch.randn(2, 6, 20, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    hidden = torch.randn(2, 20, 24)
    mixer(q, k, v, hidden, None, None)[:, 2:4].square().sum().backward()
    for name, weight in mixer.named_parameters():
        grads = weight.grad.unflatten(0, (3, -1)).abs().flatten(1).sum(1)
        assert grads[1] > 0, name
        assert not grads[[0, 2]].any(), name


@pytest.mark.parametrize("kind", [GatedDeltaNet, Linear, Mamba2])
def test_autocast_changes_nothing(kind):
    """Training runs under it, and generation does not."""
    torch.manual_seed(0)
    mixer = kind(2, 2, 16, 24)
    mixer.reset()
    q, k, v = torch.randn(1, 4, 80, 16), torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16)
    hidden = torch.randn(1, 80, 24)
    exact = mixer(q, k, v, hidden, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(q, k, v, hidden, None, None)
        found.square().mean().backward()
        narrow = mixer(*(each.bfloat16() for each in (q, k, v, hidden)), None, None)
    assert torch.equal(found, exact)
    assert all(torch.isfinite(weight.grad).all() for weight in mixer.parameters())
    assert narrow.dtype == torch.bfloat16 and (narrow - exact).norm() < 0.02 * exact.norm()
