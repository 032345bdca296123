"""Distillation: the hybrid learns the teacher's distribution of next tokens on text (forward KL on all tokens)."""

from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn
from transformers import PreTrainedModel

from flashmorph.corpus import Rows
from flashmorph.errors import UserError
from flashmorph.hosts import host_of
from flashmorph.losses import Head, forward_kl
from flashmorph.packing import apart
from flashmorph.progress import Report, silent
from flashmorph.sharding import shard_loss
from flashmorph.stages.training import TrainSettings, keep_activations, train


class DistillSettings(TrainSettings):
    """The published budget: 1B tokens at length 512, learning rate 1e-4 to 1e-5."""

    stage: ClassVar[str] = "distill"
    tokens: PositiveInt = 1_000_000_000
    length: PositiveInt = 512
    batch_tokens: PositiveInt = 49_152
    learning_rate: PositiveFloat = 1e-4
    activation_checkpointing: bool = Field(default=False, description="compute layers again instead of keeping them")


class DistillationLoss(nn.Module):
    """Mean forward KL of student to teacher; the logits of both exist a chunk of tokens at a time."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self._host = host_of(student.config)

    def forward(self, input_ids: torch.Tensor, starts: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The loss for `input_ids` `[batch, time]`, documents apart where `starts` `[batch, time]` marks their first
        tokens."""
        (teacher,) = self._teacher
        packed = apart(input_ids, starts, self._host)
        with torch.no_grad():
            target = torch.cat([each.run(teacher.model) for each in packed])
        found = torch.cat([each.run(self.student.model) for each in packed])
        return {"loss": forward_kl(found, Head.of(self.student), target, Head.of(teacher))}


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows,
    settings: DistillSettings,
    folder: Path,
    seed: int = 0,
    bf16: bool = False,
    report: Report = silent,
) -> None:
    """Train all weights of `student` in place towards `teacher`.

    Interrupted work goes on from the last whole checkpoint in `folder`.

    Raises:
        UserError: the vocabularies differ, the loss is not finite, or the processes cannot share a step evenly.
    """
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"the student has {sizes[0]:,} tokens in its vocabulary and the teacher {sizes[1]:,}")
    keep_activations(student.requires_grad_(True).train(), not settings.activation_checkpointing)
    loss = DistillationLoss(student, teacher.eval())
    shard_loss(loss, student)
    train(loss, rows, settings, folder, seed, bf16, report)
    student.eval()
