"""The shape of a switched layer: fewer and narrower heads, how they start, and what cannot be made."""

import pytest
import torch
from families import random_teacher
from test_morphable import some_tokens

from flashmorph.convert.in_memory import transplant
from flashmorph.errors import UserError
from flashmorph.mixers.start import narrow_outputs, narrow_scores
from flashmorph.model.morphable import Morphable, attach
from flashmorph.own import CACHE
from flashmorph.plan import Budget

SHAPES = {
    "half of the heads": ("qwen3: grouped", {"key_heads": 2}),
    "fewer keys": ("qwen3: grouped", {"key_heads": 2, "value_heads": 4}),
    "narrower heads": ("qwen3: grouped", {"key_dim": 8, "value_dim": 8}),
    "experts, half of the heads": ("qwen3_moe: grouped", {"key_heads": 2}),
    "fewer groups": ("llama: grouped", {"mamba_groups": 2}),
    "fewer groups, narrow": ("llama: grouped", {"mamba_expand": 1, "mamba_groups": 2}),
}


def morphable_of(family: str, settings: dict[str, int], twins: bool = False) -> tuple[Morphable, list[float]]:
    """A random teacher with branches of this shape; `twins`: query heads that share a key-value head are the same."""
    teacher = random_teacher(family, hidden_size=64, head_dim=16)
    if twins:
        with torch.no_grad():
            for layer in teacher.model.layers:
                heads = layer.self_attn.q_proj.weight.view(2, 2, 16, 64)
                heads[:, 1] = heads[:, 0]
    model, _ = transplant(teacher, settings)
    return attach(model, some_tokens(4, 48))


def parameters(morphable: Morphable) -> int:
    return sum(weight.numel() for each in morphable.branch_parameters() for weight in each)


@pytest.mark.parametrize("name", SHAPES)
def test_a_leaner_layer_is_smaller_starts_near_its_attention_and_looks_back_only(name):
    family, settings = SHAPES[name]
    (lean, errors), (wide, _) = morphable_of(family, settings), morphable_of(family, {})
    assert parameters(lean) < parameters(wide)
    assert all(error < 1 for error in errors)
    budget = Budget("layers", 1)
    model = lean.instantiate(lean.space(budget).plan(["layers.0"], budget)).eval()
    ids = some_tokens(1, 70)
    changed = ids.clone()
    changed[0, 40] = (ids[0, 40] + 1) % 97
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
        whole, read = model(ids).logits, model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], use_cache=True, **{CACHE: read[CACHE]}).logits
    assert torch.equal(before[:, :40], after[:, :40]) or (before[:, :40] - after[:, :40]).abs().max() < 1e-5
    assert (before[:, 40:] - after[:, 40:]).abs().max() > 1e-4
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family, settings, wide",
    [("qwen3: grouped", {"key_heads": 2}, {}), ("llama: grouped", {"mamba_groups": 2}, {"mamba_groups": 4})],
)
def test_heads_that_are_the_same_are_merged_without_loss(family, settings, wide):
    found, expected = (morphable_of(family, each, twins=True)[1] for each in (settings, wide))
    if family.startswith("qwen3"):
        assert found == pytest.approx(expected, rel=0.02)
    else:  # Its surplus heads look back otherwise, for each head or for two together.
        assert found == pytest.approx(expected, rel=0.2)


def test_narrow_heads_lose_nothing_where_nothing_is():
    """Queries and keys, and values, that fill 5 of 16 dimensions: 5 are enough."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 60, 24, generator=random)
    query, key, value = (
        torch.randn(3, 16, 5, generator=random) @ torch.randn(3, 5, 24, generator=random) for _ in range(3)
    )
    columns = torch.randn(3, 16, 24, generator=random)

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bth,xdh,xdk,bsk->xbts", hidden, queries, keys, hidden)

    short = narrow_scores(hidden, query, key, 5)
    assert short[0].shape == (3, 5, 24)
    torch.testing.assert_close(scores(*short), scores(query, key), rtol=1e-3, atol=1e-2)
    down, across = narrow_outputs(hidden, value, columns, 5)
    torch.testing.assert_close(down.mT @ across, value.mT @ columns, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "family, settings, said",
    [
        ("qwen3", {"key_heads": 3}, "host.key_heads=3 cannot be made of the teacher's heads; these can: 2, 4"),
        ("qwen3", {"key_heads": 4, "value_heads": 2}, "host.value_heads=2 is no multiple of host.key_heads=4"),
        ("qwen3", {"key_dim": 17}, "host.key_dim=17 is wider than the teacher's heads of 16"),
        ("qwen3", {"value_dim": 0}, "value_dim"),
        ("llama", {"mamba_groups": 3}, "host.mamba_groups=3 cannot be made of the teacher's heads; these can: 2, 4"),
    ],
)
def test_a_shape_that_cannot_be_made_says_which_can(family, settings, said):
    with pytest.raises(UserError, match=said):
        transplant(random_teacher(f"{family}: grouped", hidden_size=64, head_dim=16), settings)
