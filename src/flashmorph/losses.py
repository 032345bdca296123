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


def next_token_loss(hidden: torch.Tensor, head: nn.Linear | Head, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats, from last hidden states `[batch, time, width]`."""
    return label_loss(hidden[:, :-1].flatten(0, 1), head, input_ids[:, 1:].flatten())


def label_loss(hidden: torch.Tensor, head: nn.Linear | Head, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of `labels` `[tokens]`, from hidden states `[tokens, width]`; 0 without any."""

    def cross_entropy(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    return _in_chunks(cross_entropy, chunk_tokens(head.out_features), hidden, labels) / max(1, len(labels))


@torch.no_grad()
def token_losses(hidden: torch.Tensor, head: nn.Linear | Head, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each label `[tokens]`, in nats, from hidden states `[tokens, width]`."""
    size = chunk_tokens(head.out_features)
    parts = [
        F.cross_entropy(head(part).float(), label, reduction="none")
        for part, label in zip(hidden.split(size), labels.split(size), strict=True)
    ]
    return torch.cat(parts)
