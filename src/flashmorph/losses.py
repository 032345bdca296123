"""Losses over the vocabulary without ever holding all logits: in chunks of tokens, each with its gradient at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

LOGITS_BYTES = 128 * 2**20
"""Size of one chunk's logits in float32, on a GPU `_GPU_TIMES` as much. A handful of tensors of this size live at a
time."""
_GPU_TIMES = 4
"""There products are quick, and each chunk reads and writes the head's gradient, as large as the head in float32."""


@dataclass(frozen=True)
class Head:
    """The model's own map from last hidden states `[..., width]` to logits `[..., vocabulary]`."""

    projection: nn.Linear
    divisor: float = 1.0

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        """The head of a causal language model; some divide its logits by a constant (`logits_scaling`)."""
        return Head(cast(nn.Linear, model.get_output_embeddings()), getattr(model.config, "logits_scaling", 1.0))

    @staticmethod
    def from_linear(head: "nn.Linear | Head") -> "Head":
        """A head that is a linear map alone, or is one already."""
        return head if isinstance(head, Head) else Head(head)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., vocabulary]` of `hidden` `[..., width]`."""
        return self.of_weights(hidden, self.projection.weight, self.projection.bias)

    def of_weights(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same with other weights in place of the projection's."""
        logits = F.linear(hidden, weight, bias)
        return logits if self.divisor == 1 else logits / self.divisor

    @property
    def out_features(self) -> int:
        """The size of the vocabulary, named as in `nn.Linear`."""
        return self.projection.out_features


def logits_bytes(kind: str) -> int:
    """The size of one chunk's logits in float32 on a device of this kind (`cuda`, `cpu`, ...)."""
    return _GPU_TIMES * LOGITS_BYTES if kind == "cuda" else LOGITS_BYTES


def chunk_tokens(vocabulary: int, kind: str) -> int:
    """Tokens whose float32 logits fit into `logits_bytes`."""
    return max(1, logits_bytes(kind) // (4 * vocabulary))


def _in_chunks(
    loss: Callable[..., torch.Tensor], head: Head, hidden: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    """The sum of `loss(logits, *others)` over chunks of `hidden` `[tokens, width]` and `others` `[tokens, ...]`."""
    sources = [each for each in (hidden, head.projection.weight, head.projection.bias) if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in sources):
        total = _SumOfChunks.apply(loss, head, hidden, head.projection.weight, head.projection.bias, *others)
        return cast(torch.Tensor, total)
    return torch.stack([loss(head(part), *rest) for part, *rest in _chunks(head, hidden, *others)]).sum()


def _chunks(head: Head, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    size = chunk_tokens(head.out_features, tensors[0].device.type)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class _SumOfChunks(torch.autograd.Function):
    """`_in_chunks`, which takes the gradient of each chunk while its logits are there.

    The head's gradient is summed in float32: in bfloat16 each addition would round a sum over hundreds of chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[..., torch.Tensor],
        head: Head,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *others: torch.Tensor,
    ) -> torch.Tensor:
        """The sum; gradients are kept for the backward."""
        device, needed = hidden.device.type, ctx.needs_input_grad[2:5]
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        own = weight.detach().to(narrow).requires_grad_(needed[1])
        own_bias = None if bias is None else bias.detach().to(narrow).requires_grad_(needed[2])
        learn = [each for each in (own, own_bias) if each is not None and each.requires_grad]
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in learn]
        total, rows = torch.zeros((), device=hidden.device), []
        for part, *rest in _chunks(head, hidden, *others):
            part = part.detach().requires_grad_(needed[0])
            with torch.enable_grad():
                value = loss(head.of_weights(part, own, own_bias), *rest)
            total += value.detach()
            gradients = list(torch.autograd.grad(value, [part, *learn] if needed[0] else learn))
            if needed[0]:
                rows.append(gradients.pop(0))
            for whole, gradient in zip(sums, gradients, strict=True):
                whole += gradient
        ctx.save_for_backward(*([torch.cat(rows)] if rows else []), *sums)
        sources = zip((hidden, weight, bias), needed, strict=True)
        ctx.dtypes = [each.dtype for each, needs in sources if each is not None and needs]
        ctx.needed, ctx.others, ctx.done = needed, len(others), False
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The gradients that were kept, times that of the sum; in place, since the head's may be gigabytes."""
        if ctx.done:
            raise RuntimeError("this loss was taken backward before")
        ctx.done = True
        kept = iter(
            part.mul_(gradients[0]).to(dtype) for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, *(next(kept) if needs else None for needs in ctx.needed), *[None] * ctx.others)


def forward_kl(
    student: torch.Tensor, student_head: nn.Linear | Head, teacher: torch.Tensor, teacher_head: nn.Linear | Head
) -> torch.Tensor:
    """Mean KL(teacher || student) a token, temperature 1, from last hidden states `[..., width]`; 0 without any."""

    def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher_head(teacher).float(), -1)
        return F.kl_div(F.log_softmax(logits.float(), -1), target, log_target=True, reduction="sum")

    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    return _in_chunks(divergence, Head.from_linear(student_head), student, teacher) / max(1, len(student))


def label_loss(
    hidden: torch.Tensor, head: nn.Linear | Head, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of `labels` `[tokens]`, from hidden states `[tokens, width]`; 0 without any.

    With `weights` `[tokens]` it is the weighted sum instead.
    """
    weights = torch.full(labels.shape, 1 / max(1, len(labels)), device=labels.device) if weights is None else weights

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()

    return _in_chunks(cross_entropy, Head.from_linear(head), hidden, labels, weights)


@torch.no_grad()
def token_losses(hidden: torch.Tensor, head: nn.Linear | Head, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each label `[tokens]`, in nats, from hidden states `[tokens, width]`."""
    head = Head.from_linear(head)
    parts = [
        F.cross_entropy(head(part).float(), label, reduction="none") for part, label in _chunks(head, hidden, labels)
    ]
    return torch.cat(parts)


def top_log_probabilities(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `number` largest log-probabilities of each token, and the log tail mass of all other tokens.

    From `logits` `[tokens, vocabulary]`: float32 values `[tokens, number + 1]`, and indices `[tokens, number]` into the
    vocabulary, ascending.
    """
    all_tokens = F.log_softmax(logits.float(), -1)
    indices = all_tokens.topk(number, -1).indices.sort(-1).values
    return torch.cat([all_tokens.gather(-1, indices), _log_tail_mass(all_tokens, indices)[:, None]], -1), indices


def top_kl(student: torch.Tensor, head: nn.Linear | Head, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Mean top-k KL(teacher || student) a token: all tokens but the teacher's k likeliest are one tail bucket.

        Σ over the k of p · log(p / q) + r · log(r / s),    r and s: tail mass of teacher and student

    From the student's last hidden states `[tokens, width]` and the teacher's `top_log_probabilities`: `values`
    `[tokens, k + 1]` and `indices` `[tokens, k]`. It is never more than the full KL (merging outcomes only loses
    information), and equal to it if k is the vocabulary. Top-k probabilities without the tail are a biased estimate of
    the teacher (Sparse Logit Sampling, arXiv 2503.16870); one more outcome that carries the tail is the form
    of Tail-Aware Top-k Distillation (arXiv 2608.14728), there with the reverse KL.
    """

    def divergence(logits: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        all_tokens = F.log_softmax(logits.float(), -1)
        total = F.kl_div(all_tokens.gather(-1, indices), values[:, :-1], log_target=True, reduction="sum")
        tail = values[:, -1]
        has_tail = tail > -torch.inf
        if has_tail.any():
            student_tail = _log_tail_mass(all_tokens[has_tail], indices[has_tail])
            total = total + F.kl_div(student_tail, tail[has_tail], log_target=True, reduction="sum")
        return total

    return _in_chunks(divergence, Head.from_linear(head), student, values, indices) / max(1, len(student))


def _log_tail_mass(log_probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The log of the summed probability `[tokens]` of all tokens but `indices` `[tokens, k]`.

    It is summed, not subtracted from 1, so that a small tail stays exact.
    """
    return log_probabilities.scatter(-1, indices, -torch.inf).logsumexp(-1)
