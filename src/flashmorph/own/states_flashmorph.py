"""States that are a matrix for each key-value head, and what the mixers that keep one have in common.

This file travels with every checkpoint: it imports torch and transformers only.
"""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .mixer_flashmorph import OwnMixer, State


class StateMixer(OwnMixer):
    """A mixer whose state is a matrix for each key-value head, in float32, written and read through maps.

    All of it is computed in float32, also under autocast: rates of decay of a few thousandths have no neighbours of
    their size in bfloat16, and a checkpoint would compute something else than what was trained.

    The maps W, one for each query head and one for each key-value head, start as the identity, so scaled that
    `W q · W k` are the teacher's scores. With `norm` the output of each head has an RMSNorm and a learned scale.
    """

    chunk = 64
    key_bias = False

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, norm: bool):
        super().__init__(heads, groups, head_dim, width)
        self.norm = norm
        self.query_map = nn.Parameter(torch.empty(heads * groups * head_dim, head_dim))
        self.key_map = nn.Parameter(torch.empty(heads * head_dim, head_dim))
        if norm:
            self.scale = nn.Parameter(torch.empty(heads * groups))

    def reset(self) -> None:
        """Maps are the scaled identity, scales 1."""
        eye = torch.eye(self.head_dim) / math.sqrt(math.sqrt(self.head_dim))
        for weight in (self.query_map, self.key_map):
            init.copy_(weight, eye.repeat(len(weight) // self.head_dim, 1))
        if self.norm:
            init.ones_(self.scale)

    def forward(self, q, k, v, hidden, real, state):  # noqa: D102
        with torch.autocast(q.device.type, enabled=False):
            return self.run(q, k, v, hidden, real, state).to(v.dtype)

    @abstractmethod
    def run(self, q, k, v, hidden, real, state) -> torch.Tensor:
        """What `forward` gives of the same arguments, in float32."""
        ...

    def mapped(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`W x` in float32, of x `[batch, heads, time, head_dim]`."""
        return x.float() @ weight.float().unflatten(0, (-1, self.head_dim)).mT

    def read(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rates: torch.Tensor,
        real: torch.Tensor | None,
        state: State | None,
        strengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `chunked` gives, from and into the state; padding neither writes nor fades it."""
        if real is not None:
            keys, rates = keys * real[:, None, :, None], rates * real[:, None]
        past = state.get("sum") if state else None
        output, last = chunked(queries, keys, values, rates, past, self.groups, self.chunk, strengths)
        if state is not None:
            state["sum"] = last
        return output

    def normed(self, output: torch.Tensor) -> torch.Tensor:
        """The heads' output `[batch, heads · groups, time, head_dim]` after RMSNorm and scale, if there are any."""
        if not self.norm:
            return output
        return F.rms_norm(output, (self.head_dim,), eps=1e-6) * self.scale.float()[:, None, None]


def softmax_features(projected: torch.Tensor) -> torch.Tensor:
    """The feature map softmax([x, -x]) of Hedgehog (arXiv 2402.04347): twice as many numbers, none below 0."""
    return torch.cat([projected, -projected], -1).softmax(-1)


def of_input(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A number for each key-value head and token, `[batch, heads, time]`, in float32."""
    return F.linear(hidden.float(), weight.float(), bias.float()).mT


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rates: torch.Tensor,
    past: torch.Tensor | None,
    groups: int,
    chunk: int,
    strengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q_t S_t` with `S_t = exp(-rate_t) S_(t-1) + k_t u_t^T`, chunk by chunk, and the last S.

    u_t is `v_t`. With `strengths` b it is what the delta rule writes (Gated DeltaNet, arXiv 2412.06464, equation 10),

        u_t = b_t (v_t - exp(-rate_t) S_(t-1)^T k_t),

    within a chunk the solution of a triangular system (the WY form of arXiv 2406.06484, section 3.2).

    Args:
        q: `[batch, heads · groups, time, features]`.
        k: `[batch, heads, time, features]`; for the delta rule of length 1 at most.
        v: `[batch, heads, time, values]`.
        rates: `[batch, heads, time]`, not negative.
        past: S of the tokens before, `[batch, heads, features, values]`; None: zeros.
        groups: Query heads of a key-value head.
        chunk: Tokens that are computed together.
        strengths: `[batch, heads, time]`, between 0 and 1.
    """
    batch, heads, _, features = k.shape
    q = q.unflatten(1, (heads, groups))
    total = past if past is not None else k.new_zeros(batch, heads, features, v.shape[-1])
    outputs = []
    # Split once: the backward of a slice for each chunk would fill as many tensors of the whole size with zeros.
    parts = [each.split(chunk, -2) for each in (q, k, v, rates[..., None])]
    given = [None] * len(parts[0]) if strengths is None else strengths[..., None].split(chunk, -2)
    for q_, k_, v_, rates_, strengths_ in zip(*parts, given, strict=True):
        fallen = rates_.squeeze(-1).cumsum(-1)
        between = fallen[..., :, None] - fallen[..., None, :]
        # Above the diagonal the exponent would be positive, and may be too large before it is masked.
        weights = torch.exp(-between.masked_fill(_above(between), math.inf))
        faded = torch.exp(-fallen)[..., None]
        if strengths_ is not None:
            v_ = _written(k_, v_ - faded * (k_ @ total), weights, strengths_)
        scores = q_ @ k_[:, :, None].mT * weights[:, :, None]
        earlier = (q_ * faded[:, :, None]) @ total[:, :, None]
        outputs.append(scores @ v_[:, :, None] + earlier)
        left = torch.exp(fallen - fallen[..., -1:])
        total = total * faded[..., -1:, :] + (k_ * left[..., None]).mT @ v_
    return torch.cat(outputs, 3).flatten(1, 2), total


def _written(k: torch.Tensor, new: torch.Tensor, weights: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """What the delta rule writes within a chunk, `[batch, heads, time, values]`.

    `new` are the values without what the state before the chunk has at their keys, `weights` `[..., time, time]` how
    much of an earlier token is left at a later one.
    """
    system = strengths * (k @ k.mT) * weights
    return torch.linalg.solve_triangular(system, strengths * new, upper=False, unitriangular=True)


def half_lives(heads: int) -> torch.Tensor:
    """Rates of decay `[heads]` with half-lives of 64 to 4,096 tokens, evenly spaced in their logarithm."""
    spread = torch.linspace(6, 12, heads) if heads > 1 else torch.tensor([9.0])
    return math.log(2) / 2**spread


def _above(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
