"""Kernel halving and its schedules: exact while short, weights, order, memory, error and balance."""

import math

import pytest
import torch
from own_models import smooth
from torch import nn

from flashmorph.own import held_after
from flashmorph.own.halving_flashmorph import differences, halve, kept, kernel
from flashmorph.own.thin_flashmorph import Thin
from flashmorph.own.window_flashmorph import Window

BOTH = pytest.mark.parametrize("schedule", ["reduce", "express"])
RULES = pytest.mark.parametrize("halving", ["greedy", "published"])
DIM = 8


def numbered(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `smooth`, with the number of each token as its first value."""
    q, k, v = smooth(tokens)
    v[..., 0] = torch.arange(tokens)
    return q, k, v


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class TestThin:
    @BOTH
    def test_is_exact_while_nothing_is_halved(self, schedule):
        last = 2 + 9 + {"reduce": 2, "express": 4}[schedule] * 8 - 1
        q, k, v = smooth(last + 1)
        thin = Thin(1, 1, DIM, DIM, points=8, window=9, sinks=2, schedule=schedule)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert sum(thin.held(last)) == last > sum(thin.held(last + 1))
        assert torch.allclose(thin(q, k, v, q[0], None, None), exact, atol=1e-5)

    @BOTH
    @RULES
    def test_the_weights_of_all_that_is_held_sum_to_the_tokens(self, schedule, halving):
        thin = Thin(1, 1, DIM, DIM, points=4, window=5, sinks=2, schedule=schedule, halving=halving)
        q, k, v = smooth(600)
        state: dict = {}
        for end in range(600):
            part = slice(end, end + 1)
            thin(q[:, :, part], k[:, :, part], v[:, :, part], q[0, :, part], None, state)
            exact, weights = thin.weights(end + 1)
            assert (exact, sum(weights)) == held_after(end + 1, 4, 5, 2, schedule)
            assert (state["k"].shape[2], state["points_k"].shape[2]) == (exact, sum(weights))
            assert exact + sum(number << level for level, number in enumerate(weights)) == end + 1

    @BOTH
    @RULES
    def test_each_point_is_one_of_the_consecutive_tokens_that_it_stands_for(self, schedule, halving):
        thin = Thin(1, 1, DIM, DIM, points=4, window=3, sinks=2, schedule=schedule, halving=halving)
        for tokens in (60, 301, 600):
            state: dict = {}
            q, k, v = numbered(tokens)
            thin(q, k, v, q[0], None, state)
            first, points = 2, state["points_v"][0, 0, :, 0].tolist()
            for level, number in reversed(list(enumerate(thin.weights(tokens)[1]))):
                for _ in range(number):
                    assert first <= points.pop(0) < first + (1 << level)
                    first += 1 << level
            assert state["v"][0, 0, :, 0].tolist() == [0, 1, *range(first, tokens)]

    @BOTH
    @RULES
    def test_what_is_held_depends_neither_on_later_tokens_nor_on_other_rows(self, schedule, halving):
        thin = Thin(2, 1, DIM, DIM, points=4, window=3, sinks=1, schedule=schedule, halving=halving)
        rows = [smooth(2 * 330, seed) for seed in range(3)]
        q, k, v = (torch.cat([row[part].reshape(1, 2, 330, DIM) for row in rows]) for part in range(3))
        whole = thin(q, k, v, q[:, 0], None, None)
        states: list[dict] = [{}, {}]
        outputs = []
        for start, stop in ((0, 57), (57, 200), *((step, step + 1) for step in range(200, 330))):
            part = slice(start, stop)
            outputs.append(thin(q[:, :, part], k[:, :, part], v[:, :, part], q[:, 0, part], None, states[0]))
        assert torch.allclose(torch.cat(outputs, 2), whole, atol=1e-5)
        alone = thin(q[1:2], k[1:2], v[1:2], q[1:2, 0], None, states[1])
        assert torch.allclose(alone, whole[1:2], atol=1e-5)
        assert all(torch.equal(states[0][name][1:2], states[1][name]) for name in states[0])

    def test_express_holds_a_bounded_number_of_points_and_reduce_one_more_part_each_doubling(self):
        for points in (2, 8, 64):
            for tokens in [*range(1, 4000), *(1 << power for power in range(12, 40)), (1 << 39) - 1]:
                assert sum(held_after(tokens, points, 5, 2, "express")) <= 8 * points + 7 + math.log2(tokens)
        tokens = 7 + 128 * ((1 << 20) - 1)
        assert held_after(tokens, 64, 5, 2) == (7, 64 * 20)
        assert held_after(tokens, 64, 5, 2, "express")[1] < 6 * 64 + 20

    def test_a_full_cache_of_express_is_halved_twice_as_a_whole(self):
        q, k, v = numbered(33)
        state: dict = {}
        Thin(1, 1, DIM, DIM, points=8, window=1, schedule="express")(q, k, v, q[0], None, state)
        left = torch.arange(32)
        for _ in range(2):
            left = left[halve(k[:, :, left], v[:, :, left], "greedy")[0, 0]]
        assert state["points_v"][0, 0, :, 0].tolist() == left.tolist()

    @BOTH
    def test_more_points_err_less_and_less_than_a_window_of_their_size(self, schedule):
        q, k, v = smooth(2048)
        exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -256:]

        def error(mixer) -> float:
            found = mixer(q, k, v, q[0], None, None)[:, :, -256:]
            return ((found - exact).norm() / exact.norm()).item()

        errors = [error(Thin(1, 1, 8, 8, points, 32, schedule=schedule)) for points in (8, 16, 32, 64)]
        assert errors[-1] == min(errors) < errors[0] / 3
        held = sum(held_after(2048, 64, 32, 0, schedule))
        assert errors[-1] < error(Window(1, 1, 8, 8, size=held)) * 0.7

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"schedule": "compress"}, "reduce or express; got compress"),
            ({"schedule": "express", "points": 12}, "a power of two of points; got 12"),
            ({"halving": "best"}, "greedy or published; got best"),
        ],
    )
    def test_wrong_settings_are_one_sentence(self, settings, words):
        with pytest.raises(ValueError, match=words):
            Thin(1, 1, DIM, DIM, **{"points": 8, "window": 4, **settings})


class TestHalving:
    def test_points_that_are_the_same_are_halved_to_one_of_each(self):
        k = torch.randn(1, 2, 6, 4).repeat_interleave(2, 2)
        v = torch.randn(1, 2, 6, 4).repeat_interleave(2, 2)
        for halving in ("greedy", "published"):
            assert (halve(k, v, halving) // 2 == torch.arange(6)).all()

    def test_buckets_are_halved_apart(self):
        k, v = torch.randn(2, 3, 5, 8, 4), torch.randn(2, 3, 5, 8, 4)
        together = halve(k, v, "greedy")
        assert torch.equal(
            together, torch.stack([halve(k[:, :, each], v[:, :, each], "greedy") for each in range(5)], 2)
        )

    def test_halving_balances_the_kernel_better_than_chance(self):
        _, k, v = smooth(64)
        products = kernel(k, v)[0, 0]

        def imbalance(kept: torch.Tensor) -> float:
            signs = -torch.ones(64)
            signs[kept] = 1
            return (signs @ products @ signs).item()

        drawn = torch.Generator().manual_seed(0)
        chance = [imbalance(2 * torch.arange(32) + torch.randint(2, (32,), generator=drawn)) for _ in range(50)]
        assert imbalance(halve(k, v, "greedy")[0, 0]) < min(chance)


class TestAgainstGoodpoints:
    """The authors' package, whose kernels are others, but whose rule and whose order of halvings are the same."""

    @pytest.mark.parametrize("largest", [0.0, 1.0, 20.0])
    def test_of_the_same_kernel_and_thresholds_the_same_points_stay(self, largest):
        ktc = pytest.importorskip("goodpoints.ktc")
        for seed in range(20):
            _, k, v = smooth(64, seed)
            products = kernel(k.double(), v.double())[0, 0]
            apart = differences(products)
            drawn = torch.Generator().manual_seed(seed)
            shares = largest * (torch.rand(32, generator=drawn, dtype=torch.float64) * 2 - 1)
            # Theirs takes the second of the first pair in one of two cases, ours never.
            shares[0] = 1.0
            coresets = torch.zeros(2, 32, dtype=torch.long).numpy()
            # With this probability of failure their threshold is the square of the pair's difference.
            ktc.halve_K(products.numpy(), 2.0 * 64, (0.5 + shares / 2).numpy(), coresets)
            ours = kept(apart[None], shares[None] * apart.diagonal()[None])[0]
            assert ours.tolist() == coresets[0].tolist()

    @pytest.mark.parametrize(("points", "level"), [(4, 2), (16, 2), (16, 4), (64, 4)])
    def test_a_block_climbs_the_ladder_as_compress_halves_it(self, points, level):
        """Of `2^level · points` tokens, after the first cache: sizes, order and which points are left."""
        compress = pytest.importorskip("goodpoints.compress")
        start, block = points << level, points << level
        q, k, v = numbered(start + block + 1)
        state: dict = {}
        Thin(1, 1, DIM, DIM, points, 1, schedule="express")(q, k, v, q[0], None, state)
        ours = state["points_v"][0, 0, -points:, 0].long()

        def halved(rows):
            places = torch.from_numpy(rows).long()[:, 0] + start
            return halve(k[:, :, places], v[:, :, places], "greedy")[0, 0].numpy()

        oversampling = ((points >> level).bit_length() - 1) // 2
        left = compress.compress(torch.arange(block)[:, None].numpy(), halved, oversampling)
        assert ours.tolist() == [start + each for each in left.tolist()]


def test_halving_sees_differences_far_below_the_largest_key():
    """`exp` of a score that is 90 below the largest is 0 in float32: such points were kept by no rule."""
    torch.manual_seed(0)
    k, v = torch.randn(1, 1, 16, 128), torch.randn(1, 1, 16, 128)
    k[:, :, 0] *= 9 / 4
    sizes = kernel(k.double(), v.double()).diagonal(dim1=-2, dim2=-1)
    k = k * 4
    assert (kernel(k, v).diagonal(dim1=-2, dim2=-1) == 0).any()
    with torch.autocast("cpu", torch.bfloat16):
        found = halve(k, v, "greedy")
    assert torch.equal(found, kept(differences(kernel(k.double(), v.double())), torch.zeros(1, 1, 8)))
    assert torch.isfinite(sizes).all()
