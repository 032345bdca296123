"""Losses over the vocabulary without ever holding all logits: in chunks of tokens, recomputed in the backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

LOGITS_BYTES = 128 * 2**20
"""Size of one chunk's logits in float32. A handful of tensors of this size live at a time."""


@dataclass(frozen=True)
class Head:
    """From last hidden states `[..., width]` to logits `[..., vocabulary]`, as the model itself goes there."""

    projection: nn.Linear
    divisor: float = 1.0

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        """The head of a causal language model; some divide its logits by a constant (`logits_scaling`)."""
        return Head(model.lm_head, getattr(model.config, "logits_scaling", 1.0))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits = self.projection(hidden)
        return logits if self.divisor == 1 else logits / self.divisor

    @property
    def out_features(self) -> int:
        """The number of logits, under the name that a plain projection has for it."""
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
        found = F.log_softmax(student_head(student).float(), -1)
        return F.kl_div(found, target, log_target=True, reduction="sum")

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
    """The `number` largest log-probabilities of each token, and the logarithm of what all others have together.

    `logits` `[tokens, vocabulary]`; gives float32 `[tokens, number + 1]`, and `[tokens, number]` the places in the
    vocabulary, ascending.
    """
    found = F.log_softmax(logits.float(), -1)
    places = found.topk(number, -1).indices.sort(-1).values
    return torch.cat([found.gather(-1, places), _of_others(found, places)[:, None]], -1), places


def top_kl(student: torch.Tensor, head: nn.Linear | Head, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) a token, all tokens of the vocabulary but the teacher's likeliest taken as one.

        Σ over the k of p · log(p / q) + r · log(r / s),    r and s: what teacher and student leave to all others

    From the student's last hidden states `[tokens, width]` and what `top_log_probabilities` kept of the teacher:
    `values` `[tokens, k + 1]` and `places` `[tokens, k]`. Never more than the full KL (merging outcomes loses
    information only), and equal to it where k is the vocabulary. Top-k probabilities without the rest are a biased
    picture of the teacher (Sparse Logit Sampling, arXiv 2503.16870); one more token that carries the rest is the form
    of Tail-Aware Top-k Distillation (arXiv 2608.14728), there with the reverse KL.
    """

    def divergence(student: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        found = F.log_softmax(head(student).float(), -1)
        total = F.kl_div(found.gather(-1, places), values[:, :-1], log_target=True, reduction="sum")
        rest = values[:, -1]
        left = rest > -torch.inf
        if left.any():
            others = _of_others(found[left], places[left])
            total = total + F.kl_div(others, rest[left], log_target=True, reduction="sum")
        return total

    return _in_chunks(divergence, chunk_tokens(head.out_features), student, values, places) / max(1, len(student))


def _of_others(log_probabilities: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The logarithm of what all but `places` have together, `[tokens]`; summed, not taken from 1, so that little stays
    exact."""
    return log_probabilities.scatter(-1, places, -torch.inf).logsumexp(-1)
