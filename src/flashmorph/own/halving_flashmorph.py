"""Kernel halving: one of each two neighbours, so that sums over the kept ones are close to half of those over all.

This file travels with every checkpoint: it imports torch and transformers only.
"""

import math

import torch

HALVINGS = ("greedy", "published")
_FAILURE = 0.5
"""The probability with which the published bound may fail, of each halving; the paper divides one among all."""


def halve(k: torch.Tensor, v: torch.Tensor, halving: str, seed: int = 0) -> torch.Tensor:
    """The indices `[batch, heads, ..., points / 2]` of the points that stay, one of each two neighbours, in order.

    Kernel halving (Express, arXiv 2606.10944, algorithm 6): signs are chosen one pair after the other so that the
    signed sum of the kernel `exp(k · k' / sqrt(head_dim)) (v · v' + b^2)` stays small, b the largest entry of a value.

    Args:
        k: `[batch, heads, ..., points, head_dim]`, an even number of points; `...`: buckets that are halved apart.
        v: As `k`.
        halving: `greedy`, always the better sign, or `published`: at random where both are about as good, by the
            simplified thresholds, and with probability 1/2 the other half in the end.
        seed: Of what is drawn, which is the same for all rows and heads.
    """
    # In float64, where a device has it: far from the largest key exp() is 0 in float32, and autocast would make less.
    exact = torch.float32 if k.device.type == "mps" else torch.float64
    with torch.autocast(k.device.type, enabled=False):
        apart = differences(kernel(k.to(exact), v.to(exact)))
    if halving == "greedy":
        return kept(apart, torch.zeros_like(apart[..., 0]))
    drawn = torch.Generator().manual_seed(seed)
    draws = torch.rand(apart.shape[2:-1], generator=drawn) * 2 - 1
    sizes = apart.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    largest = 0.5 + math.log(4 * apart.shape[-1] / _FAILURE)
    indices = kept(apart, draws.to(k.device) * largest * sizes * sizes.cummax(-1).values)
    return indices ^ int(torch.randint(2, (), generator=drawn))


def halve_by_coin(k: torch.Tensor, seed: int) -> torch.Tensor:
    """As `halve`, but each of two neighbours stays with probability 1/2."""
    drawn = torch.Generator().manual_seed(seed)
    pairs = torch.arange(k.shape[-2] // 2)
    coins = torch.randint(2, (*k.shape[2:-2], len(pairs)), generator=drawn)
    return (2 * pairs + coins).to(k.device).expand(*k.shape[:-2], -1)


def kept(apart: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """The indices of the points that stay, `[..., pairs]`.

    Args:
        apart: Products of the differences of neighbours, `[..., pairs, pairs]`.
        limits: The second of a pair stays where the first's product with the signed sum so far is at least this,
            `[..., pairs]`. Of the first pair the first one stays.
    """
    pairs = apart.shape[-1]
    total = apart[..., 0, :].clone()
    swaps = [torch.zeros_like(total[..., 0], dtype=torch.bool)]
    for pair in range(1, pairs):
        swap = limits[..., pair] <= total[..., pair]
        total = total + torch.where(swap, -1.0, 1.0)[..., None] * apart[..., pair, :]
        swaps.append(swap)
    return 2 * torch.arange(pairs, device=apart.device) + torch.stack(swaps, -1)


def kernel(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The kernel that halving balances, `[..., points, points]`, up to a factor for each bucket."""
    scores = k @ k.mT / math.sqrt(k.shape[-1])
    scores = scores - scores.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    bound = v.abs().amax((-2, -1))[..., None, None]
    return scores.exp() * (v @ v.mT + bound**2)


def differences(products: torch.Tensor) -> torch.Tensor:
    """Products of the differences of neighbours, `[..., pairs, pairs]`, from those of points."""
    even, odd = products[..., 0::2, :], products[..., 1::2, :]
    return even[..., 0::2] - even[..., 1::2] - odd[..., 0::2] + odd[..., 1::2]
