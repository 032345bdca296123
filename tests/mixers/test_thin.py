"""Kernel halving: exact while short, weights, error and balance."""

import pytest
import torch
from own_models import smooth
from torch import nn

from flashmorph.own import held_after
from flashmorph.own.thin_flashmorph import Thin, halve
from flashmorph.own.window_flashmorph import Window


class TestThin:
    @torch.no_grad()
    def test_is_exact_while_nothing_is_halved(self):
        q, k, v = smooth(40)
        thin = Thin(1, 1, 8, 8, points=8, window=25)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert thin.held(40) == (40, 0)
        assert torch.allclose(thin(q, k, v, q[0], None, None), exact, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("thresholds", ["greedy", "published"])
    def test_the_weights_of_all_that_is_held_sum_to_the_tokens(self, thresholds):
        thin, state = Thin(1, 1, 8, 8, points=4, window=5, sinks=2, thresholds=thresholds), {}
        q, k, v = smooth(150)
        for end in range(150):
            part = slice(end, end + 1)
            thin(q[:, :, part], k[:, :, part], v[:, :, part], q[0, :, part], None, state)
            exact, sampled = thin.held(end + 1)
            assert (state["k"].shape[2], state["points_k"].shape[2]) == (exact, sampled)
            assert exact + sum(thin._weights(end + 1)) == end + 1

    @torch.no_grad()
    def test_more_points_err_less_and_less_than_a_window_of_their_size(self):
        q, k, v = smooth(2048)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -256:]

        def error(mixer) -> float:
            found = mixer(q, k, v, q[0], None, None)[:, :, -256:]
            return ((found - exact).norm() / exact.norm()).item()

        errors = [error(Thin(1, 1, 8, 8, points=points, window=32)) for points in (8, 16, 32, 64)]
        assert errors[-1] == min(errors) < errors[0] / 3
        exact_tokens, points = held_after(2048, 64, 32)
        assert errors[-1] < error(Window(1, 1, 8, 8, size=exact_tokens + points)) * 0.7

    def test_points_that_are_the_same_are_halved_to_one_of_each(self):
        k = torch.randn(1, 2, 6, 4).repeat_interleave(2, 2)
        v = torch.randn(1, 2, 6, 4).repeat_interleave(2, 2)
        kept = halve(k, v, "greedy")
        assert (kept // 2 == torch.arange(6)).all()

    def test_halving_balances_the_kernel_better_than_chance(self):
        _, k, v = smooth(64)
        scores = torch.exp(k[0, 0] @ k[0, 0].T / 8**0.5) * (v[0, 0] @ v[0, 0].T + v.abs().max() ** 2)

        def imbalance(kept: torch.Tensor) -> float:
            signs = -torch.ones(64)
            signs[kept] = 1
            return (signs @ scores @ signs).item()

        drawn = torch.Generator().manual_seed(0)
        chance = [imbalance(2 * torch.arange(32) + torch.randint(2, (32,), generator=drawn)) for _ in range(50)]
        assert imbalance(halve(k, v, "greedy")[0, 0]) < min(chance)
