"""Nystromformer's approximation of attention, both ways and causal, as a reference."""

import math

import torch


def nystrom(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, landmarks: int, steps: int = 6, causal: bool = False
) -> torch.Tensor:
    """Nystromformer's approximation of attention, `[heads, time, dim]` each (arXiv 2102.03902, equation 14).

    `causal` masks every factor to what lies before, and inverts the middle one by solving a triangular system.
    """
    heads, time, dim = q.shape
    size = time // landmarks
    q, k = q / dim**0.25, k / dim**0.25
    ql, kl = (each.unflatten(1, (landmarks, size)).mean(2) for each in (q, k))
    first, middle, last = q @ kl.mT, ql @ kl.mT, ql @ k.mT
    if not causal:
        first, middle, last = first.softmax(-1), middle.softmax(-1), last.softmax(-1)
        inverse = middle.mT / middle.sum(-2).max()
        eye = torch.eye(landmarks, dtype=q.dtype)
        for _ in range(steps):
            product = middle @ inverse
            inverse = inverse / 4 @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
        return first @ inverse @ (last @ v)
    ends = (torch.arange(landmarks) + 1) * size
    late = ends > torch.arange(time)[:, None] + 1
    first = first.masked_fill(late, -math.inf).softmax(-1).nan_to_num(0.0)
    middle = middle.masked_fill(torch.ones(landmarks, landmarks, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    last = last.masked_fill(torch.arange(time) >= ends[:, None], -math.inf).softmax(-1)
    return first @ torch.linalg.solve_triangular(middle, last @ v, upper=False)
