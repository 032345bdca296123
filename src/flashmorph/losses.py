"""Losses over the vocabulary without ever holding all logits: in chunks of tokens, recomputed in the backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

LOGITS_BYTES = 128 * 2**20
"""Size of one chunk's logits in float32. A handful of tensors of this size live at a time."""


@dataclass(frozen=True)
class Head:
    """The model's own map from last hidden states `[..., width]` to logits `[..., vocabulary]`."""

    projection: nn.Linear
    divisor: float = 1.0

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        """The head of a causal language model; some divide its logits by a constant (`logits_scaling`)."""
        return Head(cast(nn.Linear, model.get_output_embeddings()), getattr(model.config, "logits_scaling", 1.0))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., vocabulary]` of `hidden` `[..., width]`."""
        logits = self.projection(hidden)
        return logits if self.divisor == 1 else logits / self.divisor

    @property
    def out_features(self) -> int:
        """The size of the vocabulary, named as in `nn.Linear`."""
        return self.projection.out_features


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose float32 logits fit into `LOGITS_BYTES`."""
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def _in_chunks(loss: Callable[..., torch.Tensor], size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """The sum of `loss` over chunks of `size` tokens of `tensors` `[tokens, ...]`, each recomputed in the backward."""
    parts = [
        checkpoint(loss, *chunk, use_reentrant=False)
        for chunk in zip(*(tensor.split(size) for tensor in tensors), strict=True)
    ]
    return torch.stack(parts).sum()


def forward_kl(
    student: torch.Tensor, student_head: nn.Linear | Head, teacher: torch.Tensor, teacher_head: nn.Linear | Head
) -> torch.Tensor:
    """Mean KL(teacher || student) a token, temperature 1, from last hidden states `[..., width]`; 0 without any."""

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher_head(teacher).float(), -1)
        log_probabilities = F.log_softmax(student_head(student).float(), -1)
        return F.kl_div(log_probabilities, target, log_target=True, reduction="sum")

    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    return _in_chunks(divergence, chunk_tokens(student_head.out_features), student, teacher) / max(1, len(student))


def label_loss(
    hidden: torch.Tensor, head: nn.Linear | Head, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of `labels` `[tokens]`, from hidden states `[tokens, width]`; 0 without any.

    With `weights` `[tokens]` it is the weighted sum instead.
    """
    weights = torch.full(labels.shape, 1 / max(1, len(labels)), device=labels.device) if weights is None else weights

    def cross_entropy(hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(head(hidden).float(), labels, reduction="none") * weights).sum()

    return _in_chunks(cross_entropy, chunk_tokens(head.out_features), hidden, labels, weights)


@torch.no_grad()
def token_losses(hidden: torch.Tensor, head: nn.Linear | Head, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each label `[tokens]`, in nats, from hidden states `[tokens, width]`."""
    size = chunk_tokens(head.out_features)
    parts = [
        F.cross_entropy(head(part).float(), label, reduction="none")
        for part, label in zip(hidden.split(size), labels.split(size), strict=True)
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

    def divergence(student: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        all_tokens = F.log_softmax(head(student).float(), -1)
        total = F.kl_div(all_tokens.gather(-1, indices), values[:, :-1], log_target=True, reduction="sum")
        tail = values[:, -1]
        has_tail = tail > -torch.inf
        if has_tail.any():
            student_tail = _log_tail_mass(all_tokens[has_tail], indices[has_tail])
            total = total + F.kl_div(student_tail, tail[has_tail], log_target=True, reduction="sum")
        return total

    return _in_chunks(divergence, chunk_tokens(head.out_features), student, values, indices) / max(1, len(student))


def _log_tail_mass(log_probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The log of the summed probability `[tokens]` of all tokens but `indices` `[tokens, k]`.

    It is summed, not subtracted from 1, so that a small tail stays exact.
    """
    return log_probabilities.scatter(-1, indices, -torch.inf).logsumexp(-1)
