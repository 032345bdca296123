"""Distillation: the hybrid learns the teacher's distribution of next tokens on text (forward KL on all tokens).

The teacher runs beside the student, or its logits were written before (`teacher_logits.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from flashmorph.data.isolation import apart, as_often_everywhere, token_order
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.hosts import host_of, supports_varlen
from flashmorph.hosts.parts import decoder_of
from flashmorph.inputs.settings import Length, Rate, Tokens, TokensAtOnce
from flashmorph.losses import Head, forward_kl, top_kl
from flashmorph.model.sharding import is_sharded, shard_loss
from flashmorph.progress import Report, silent
from flashmorph.stages.dropout import without_dropout
from flashmorph.stages.settings import IsolatedTrainSettings
from flashmorph.stages.step import token_mean
from flashmorph.stages.teacher_logits import LogitSettings, RowsWithLogits
from flashmorph.stages.training import keep_activations, train


class DistillSettings(IsolatedTrainSettings):
    """The published budget: 1B tokens at length 512, learning rate 1e-4 to 1e-5."""

    stage: ClassVar[str] = "distill"
    tokens: Tokens = 1_000_000_000
    length: Length = 512
    batch_tokens: TokensAtOnce = 49_152
    learning_rate: Rate = 1e-4
    teacher_logits: LogitSettings | None = None


class DistillationLoss(nn.Module):
    """Mean forward KL of student to teacher; the logits of both exist a chunk of tokens at a time.

    The student loses its dropout (`without_dropout`): the teacher has none.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.student = without_dropout(student)
        self._teacher = (teacher,)
        self._host, self._is_sharded = host_of(student.config), is_sharded(student)

    def forward(
        self, input_ids: torch.Tensor, starts: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The loss for `input_ids` `[batch, time]`.

        `starts` `[batch, time]` is True at the first token of each document (None: they are not isolated), `loss_mask`
        `[batch, time]` at each target of the loss (None: all tokens).
        """
        (teacher,) = self._teacher
        packed = apart(input_ids, starts, supports_varlen(self._host, input_ids.device), loss_mask)
        if self._is_sharded:
            packed = as_often_everywhere(packed)
        with torch.no_grad():
            target = torch.cat([each.predicting(each.run(decoder_of(teacher))) for each in packed])
        hidden = torch.cat([each.predicting(each.run(decoder_of(self.student))) for each in packed])
        return token_mean(forward_kl(hidden, Head.of(self.student), target, Head.of(teacher)), len(hidden))


class StoredDistillationLoss(nn.Module):
    """Mean forward top-k KL of student to stored teacher logits; the teacher's other tokens are one tail bucket."""

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = without_dropout(student)
        self._host, self._is_sharded = host_of(student.config), is_sharded(student)

    def forward(
        self,
        input_ids: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        starts: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss for `input_ids` `[batch, time]`, from the teacher's log-probabilities.

        `values` `[batch, time, k + 1]` are those of the tokens `indices` `[batch, time, k]` and of the tail; `starts`
        and `loss_mask` as in `DistillationLoss`.
        """
        packed = apart(input_ids, starts, supports_varlen(self._host, input_ids.device), loss_mask)
        if self._is_sharded:
            packed = as_often_everywhere(packed)
        hidden = torch.cat([each.predicting(each.run(decoder_of(self.student))) for each in packed])
        order = token_order(input_ids, starts, supports_varlen(self._host, input_ids.device), loss_mask)
        values, indices = (each.flatten(0, 1)[order] for each in (values, indices))
        return token_mean(top_kl(hidden, Head.of(self.student), values, indices), len(hidden))


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: Rows | RowsWithLogits,
    settings: DistillSettings,
    folder: Path,
    seed: int = 0,
    bf16: bool = False,
    report: Report = silent,
    report_to: Sequence[str] = (),
) -> None:
    """Train all weights of `student` in place towards `teacher`.

    A step's loss is the mean over all its targets. Dropout is switched off in `student`; its configuration keeps the
    teacher's value. An interrupted call continues from the last complete checkpoint in `folder`.

    Args:
        student: The hybrid, in float32, unsharded or sharded by `shard_student`.
        teacher: The model that is imitated; None: its logits are in `rows`.
        rows: Rows of `settings.length` tokens, `RowsWithLogits` without a teacher.
        settings: Tokens, batch, learning rate and memory options.
        folder: For checkpoints and the log.
        seed: Of the order of rows.
        bf16: Whether forwards run under bfloat16 autocast.
        report: Called after each step with the steps done, all steps and the loss.
        report_to: Trackers (`tensorboard`, `trackio`, `wandb`) that get the log too.

    Raises:
        UserError: the vocabularies differ, the loss is not finite, or a step does not divide evenly among the ranks.
    """
    if teacher and student.config.vocab_size != teacher.config.vocab_size:
        sizes = student.config.vocab_size, teacher.config.vocab_size
        raise UserError(f"the student has {sizes[0]:,} tokens in its vocabulary and the teacher {sizes[1]:,}")
    keep_activations(student.requires_grad_(True).train(), settings.activation_checkpointing is not True)
    loss = DistillationLoss(student, teacher.eval()) if teacher else StoredDistillationLoss(student)
    shard_loss(loss, student)
    train(loss, rows, settings, folder, seed, bf16, report, report_to=report_to)
    student.eval()
