"""Attention pooled by segment, and why it is not a causal Nystromformer."""

import math

import pytest
import torch
from nystrom_reference import nystrom
from own_models import smooth
from torch import nn
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from flashmorph.own import pooled_after
from flashmorph.own.pooled_flashmorph import Pooled


@torch.no_grad()
def test_is_exact_while_nothing_is_pooled():
    q, k, v = smooth(40)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert pooled_after(40, 8, 33)[:2] == (40, 0)
    assert torch.allclose(Pooled(1, 1, 8, 8, segment=8, window=33)(q, k, v, q[0], None, None), exact, atol=1e-5)


@torch.no_grad()
def test_it_is_attention_to_means_and_to_what_mean_queries_see():
    """Query by query from the definition, with two query heads of one key-value head and a sink."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 30, 8, generator=generator) for heads in (2, 1, 1))
    found = Pooled(1, 2, 8, 8, segment=4, window=5, sinks=1)(q, k, v, q[0], None, None)
    for head in range(2):
        for query in range(30):
            segments = max(0, query - 1 - 5) // 4
            keys, values, weights = [k[0, 0, :1]], [v[0, 0, :1]], [0.0]
            for segment in range(segments):
                own = slice(1 + 4 * segment, 5 + 4 * segment)
                seen = torch.softmax(q[0, head, own].mean(0) @ k[0, 0, own].T / math.sqrt(8), -1)
                keys.append(k[0, 0, own].mean(0)[None])
                values.append((seen @ v[0, 0, own])[None])
                weights.append(math.log(4))
            exact = slice(min(1 + 4 * segments, query + 1), query + 1)
            keys, values = torch.cat([*keys, k[0, 0, exact]]), torch.cat([*values, v[0, 0, exact]])
            bias = torch.tensor(weights + [0.0] * (len(keys) - len(weights)))
            scores = q[0, head, query] @ keys.T / math.sqrt(8) + bias
            assert torch.allclose(found[0, head, query], scores.softmax(-1) @ values, atol=1e-5), query


@torch.no_grad()
@pytest.mark.parametrize("landmarks", [4, 8, 16])
def test_the_bidirectional_form_is_transformers(landmarks):
    config = NystromformerConfig(
        hidden_size=32, num_attention_heads=4, num_landmarks=landmarks, segment_means_seq_len=64
    )
    torch.manual_seed(0)
    module = NystromformerSelfAttention(config).eval().double()
    module.conv.weight.zero_()  # Its skip of the values is no part of the approximation.
    hidden = torch.randn(1, 64, 32, dtype=torch.float64)
    q, k, v = (
        projection(hidden)[0].unflatten(-1, (4, 8)).transpose(0, 1)
        for projection in (module.query, module.key, module.value)
    )
    expected = module(hidden)[0][0].unflatten(-1, (4, 8)).transpose(0, 1)
    assert torch.allclose(nystrom(q, k, v, landmarks), expected, atol=1e-10)


@torch.no_grad()
def test_as_many_landmarks_as_tokens_are_exact_attention():
    q, k, v = (0.3 * torch.randn(2, 24, 8, dtype=torch.float64) for _ in range(3))
    exact = nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(nystrom(q, k, v, 24, steps=40), exact, atol=1e-6)


@torch.no_grad()
def test_its_causal_form_needs_every_key_and_a_stable_solve():
    """What decision 31 says: causal only by the triangular solve, which amplifies, and row i reads all keys before."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2.0 * torch.randn(1, 256, 16, dtype=torch.float64, generator=generator) for _ in range(3))
    changed = k.clone()
    changed[:, -1] += 1
    assert torch.equal(nystrom(q, changed, v, 32, causal=True)[:, :-1], nystrom(q, k, v, 32, causal=True)[:, :-1])
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    pooled = Pooled(1, 1, 16, 16, segment=8, window=8)(*(each[None] for each in (q, k, v)), q, None, None)[0]
    late = slice(-128, None)
    errors = [((found - exact)[:, late].norm() / exact[:, late].norm()).item() for found in
              (nystrom(q, k, v, 32, causal=True), pooled)]  # fmt: skip
    assert errors[0] > 2 * errors[1]
