"""Extension: next-token training at a longer context than the one distilled at."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from flashmorph.data.isolation import apart, as_often_everywhere
from flashmorph.data.rows import Rows
from flashmorph.hosts import host_of, supports_varlen
from flashmorph.hosts.parts import decoder_of
from flashmorph.inputs.settings import Length, Rate, Tokens, TokensAtOnce
from flashmorph.losses import Head, label_loss
from flashmorph.model.sharding import is_sharded, shard_loss
from flashmorph.progress import Report, silent
from flashmorph.stages.dropout import without_dropout
from flashmorph.stages.settings import TrainSettings
from flashmorph.stages.step import token_mean
from flashmorph.stages.training import keep_activations, train


class ExtendSettings(TrainSettings):
    """The published budget: 1B tokens at length 16K, constant learning rate 1e-5.

    The published rows are concatenated documents that see each other. Most documents of the web are far shorter than
    such a row: isolated, they would teach nothing about its length.
    """

    stage: ClassVar[str] = "extend"
    tokens: Tokens = 1_000_000_000
    length: Length = 16_384
    batch_tokens: TokensAtOnce = 2_097_152
    documents: Literal["joined", "long"] = Field(
        default="joined",
        description="`joined`: those in a row see each other; `long`: only such as fill rows on their own",
    )
    learning_rate: Rate = 1e-5
    checkpoint_steps: int = Field(default=50, gt=0, le=10**9, description="steps between two checkpoints")

    @property
    def takes_long_documents(self) -> bool:
        """See `TrainSettings`."""
        return self.documents == "long"


class NextTokenLoss(nn.Module):
    """Mean next-token cross-entropy; logits exist a chunk of tokens at a time. Dropout of the model is switched off."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.student = without_dropout(model)
        self._host, self._is_sharded = host_of(model.config), is_sharded(model)

    def forward(
        self, input_ids: torch.Tensor, starts: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The loss for `input_ids` `[batch, time]`.

        With `starts` `[batch, time]`, True at the first token of each document, documents are isolated and those tokens
        are no targets. `loss_mask` `[batch, time]` is True at each target (None: all tokens).
        """
        packed = apart(input_ids, starts, supports_varlen(self._host, input_ids.device), loss_mask)
        if self._is_sharded:
            packed = as_often_everywhere(packed)
        hidden, labels = [], []
        for each in packed:
            positions, targets = each.next_tokens()
            hidden.append(each.run(decoder_of(self.student))[positions])
            labels.append(targets)
        targets = torch.cat(labels)
        return token_mean(label_loss(torch.cat(hidden), Head.of(self.student), targets), len(targets))


def extend(
    model: PreTrainedModel,
    rows: Rows,
    settings: ExtendSettings,
    folder: Path,
    seed: int = 0,
    bf16: bool = False,
    report: Report = silent,
    report_to: Sequence[str] = (),
) -> None:
    """Train all weights of `model` in place on longer rows.

    A step's loss is the mean over all its targets. Dropout is switched off in `model`; its configuration keeps the
    teacher's value. An interrupted call continues from the last complete checkpoint in `folder`.

    Args:
        model: The hybrid, in float32, unsharded or sharded by `shard_student`.
        rows: Rows of `settings.length` tokens.
        settings: Tokens, batch, learning rate and clipping.
        folder: For checkpoints and the log.
        seed: Of the order of rows.
        bf16: Whether forwards run under bfloat16 autocast.
        report: Called after each step with the steps done, all steps and the loss.
        report_to: Trackers (`tensorboard`, `trackio`, `wandb`) that get the log too.

    Raises:
        UserError: the loss is not finite, or a step does not divide evenly among the ranks.
    """
    keep_activations(model.requires_grad_(True).train(), settings.activation_checkpointing is not True)
    loss = NextTokenLoss(model)
    shard_loss(loss, model)
    train(loss, rows, settings, folder, seed, bf16, report, report_to=report_to)
    model.eval()
