"""Gated linear attention: its three forms are one."""

import pytest
import torch

from flashmorph.own.states_flashmorph import chunked


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_chunked_recurrent_and_parallel_linear_attention_are_one(decay):
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2, 4, 50, 6, generator=generator)
    k = torch.rand(2, 2, 50, 6, generator=generator)
    v = torch.randn(2, 2, 50, 5, generator=generator)
    rates = decay * torch.rand(2, 2, 50, generator=generator)
    found, last = chunked(q, k, v, rates, None, 2, 16)
    state = torch.zeros(2, 2, 6, 5)
    steps = []
    for t in range(50):
        state = state * torch.exp(-rates[:, :, t])[..., None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        steps.append(torch.einsum("bhgf,bhfv->bhgv", q.unflatten(1, (2, 2))[:, :, :, t], state).flatten(1, 2))
    assert torch.allclose(found, torch.stack(steps, 2), atol=1e-5)
    assert torch.allclose(last, state, atol=1e-5)
    fallen = rates.cumsum(-1)
    weights = torch.exp(fallen[..., None, :] - fallen[..., :, None]).tril()
    scores = torch.einsum("bhgtf,bhsf->bhgts", q.unflatten(1, (2, 2)), k) * weights[:, :, None]
    assert torch.allclose(found, torch.einsum("bhgts,bhsv->bhgtv", scores, v).flatten(1, 2), atol=1e-5)
