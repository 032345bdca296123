"""DashAttention: its routing, what it keeps, and gamma from a density."""

import pytest
import torch
from conftest import random_qwen3
from entmax import entmax15 as reference
from own_models import smooth
from torch import nn

from flashmorph.convert.in_memory import transplant
from flashmorph.mixers.own import gamma_of_density
from flashmorph.model.morphable import attach
from flashmorph.own import VARIANTS, Dash
from flashmorph.own.dash_flashmorph import entmax15


def dash(**settings) -> Dash:
    mixer = Dash(2, 3, 8, 16, **{"chunk": 5, **settings})
    mixer.reset()
    return mixer


def drawn(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, tokens, 8, generator=generator) for heads in (6, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2, 9, 300])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_entmax_and_its_gradient_are_the_packages(size, scale):
    scores = (scale * torch.randn(7, size, generator=torch.Generator().manual_seed(size))).double()
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    towards = torch.randn(7, size, dtype=torch.float64)
    found, expected = entmax15(ours), reference(theirs, dim=-1)
    assert torch.allclose(found, expected, atol=1e-9)
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


@torch.no_grad()
def test_where_every_chunk_is_kept_it_is_full_attention():
    q, k, v = drawn(43)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(dash(gamma=0.0)(q, k, v, q[:, 0], None, None), exact, atol=1e-5)
    assert torch.allclose(dash(chunk=64)(q, k, v, q[:, 0], None, None), exact, atol=1e-5)


@torch.no_grad()
def test_it_attends_to_the_chunks_that_entmax_keeps_and_to_no_others():
    q, k, v = drawn(38)
    mixer = dash(gamma=20.0, local=2)
    output, mask = mixer(q, k, v, q[:, 0], None, None), torch.zeros(2, 2, 38, 38, dtype=torch.bool)
    for row, head, query in ((row, head, query) for row in range(2) for head in range(2) for query in range(38)):
        own = query // 5
        kept = {own, own - 1}
        if own:
            means = torch.stack([k[row, head, 5 * chunk : 5 * chunk + 5].mean(0) for chunk in range(own)])
            scores = 20.0 * q[row, 3 * head : 3 * head + 3, query] @ means.T / 8**0.5
            kept |= {chunk for chunk in range(own) if reference(scores, dim=-1).mean(0)[chunk] > 0}
        for chunk in kept & set(range(own + 1)):
            mask[row, head, query, 5 * chunk : min(5 * chunk + 5, query + 1)] = True
    assert 0.2 < mask.float().mean() / 0.5 < 0.9
    expected = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.repeat_interleave(3, 1), enable_gqa=True
    )
    assert torch.allclose(output, expected, atol=1e-4)


def test_a_zero_query_pools_by_the_mean_and_gets_a_gradient():
    q, k, v = drawn(30)
    mixer = dash(gamma=2.0, sigma=1.0)
    assert torch.allclose(mixer.summaries(k), k.unflatten(2, (6, 5)).mean(3), atol=1e-6)
    mixer(q, k, v, q[:, 0], None, None).square().sum().backward()
    assert mixer.summary_query.grad is not None and (mixer.summary_query.grad != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("density", [0.4, 0.7])
def test_gamma_follows_from_the_density(density):
    mixers = [dash(), dash()]
    for seed, mixer in enumerate(mixers):
        q, k, _ = drawn(128, seed)
        mixer.sample(q, k)
    gamma = gamma_of_density(mixers, density)
    shares = [mixer.kept_share(*mixer.samples[0], gamma) for mixer in mixers]
    assert abs(sum(shares) / 2 - density) < 0.02


def test_one_gamma_serves_every_layer_of_a_model():
    ids = torch.randint(90, (2, 256), generator=torch.Generator().manual_seed(0))
    settings = {"mixers": "full,dash", "chunk": 16, "density": 0.5}
    supernet, errors = attach(transplant(random_qwen3(num_hidden_layers=3), settings)[0], ids)
    gammas = {layer.branches["dash"].module.mixer.gamma.unique().item() for layer in supernet.layers}
    assert len(gammas) == 1 and gammas != {VARIANTS["package"]["gamma"]}
    assert all(not layer.branches["dash"].module.mixer.samples for layer in supernet.layers)
    assert max(errors) < 0.9


@torch.no_grad()
def test_smaller_gammas_err_less():
    q, k, v = smooth(512)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = []
    for gamma in (8.0, 1.0, 0.1):
        mixer = Dash(1, 1, 8, 8, chunk=16, gamma=gamma)
        mixer.reset()
        errors.append((mixer(q, k, v, q[0], None, None) - exact).norm().item())
    assert errors[0] > errors[1] > errors[2]
