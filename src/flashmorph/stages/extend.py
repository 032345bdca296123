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
from flashmorph.inputs.settings import Length, Rate, Tokens, TokensAtOnce
from flashmorph.losses import Head, label_loss
from flashmorph.model.sharding import is_sharded, shard_loss
from flashmorph.progress import Report, silent
from flashmorph.stages.dropout import without_dropout
from flashmorph.stages.step import token_mean
from flashmorph.stages.training import TrainSettings, keep_activations, train


class ExtendSettings(TrainSettings):
    """The published budget: 1B tokens at length 16K, constant learning rate 1e-5.

    The published rows are documents end to end that see each other. Most documents of the web are far shorter than
    such a row, so kept apart they would teach nothing about its length.
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
    activation_checkpointing: bool | Literal["auto"] = Field(
        default="auto", description="compute layers again instead of keeping them; `auto`: where memory asks for it"
    )

    @property
    def takes_long_documents(self) -> bool:
        """See `TrainSettings`."""
        return self.documents == "long"


class NextTokenLoss(nn.Module):
    """Mean next-token cross-entropy; logits exist a chunk of tokens at a time. The model loses its dropout."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.student = without_dropout(model)
        self._host, self._is_sharded = host_of(model.config), is_sharded(model)

    def forward(
        self, input_ids: torch.Tensor, starts: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The loss for `input_ids` `[batch, time]`, of the tokens at which `loss_mask` `[batch, time]` is True; where
        `starts` `[batch, time]` marks the first tokens of documents, they are kept apart and those tokens are not
        predicted."""
        packed = apart(input_ids, starts, supports_varlen(self._host, input_ids.device), loss_mask)
        if self._is_sharded:
            packed = as_often_everywhere(packed)
        hidden, labels = [], []
        for each in packed:
            places, following = each.next_tokens()
            hidden.append(each.run(self.student.model)[places])
            labels.append(following)
        every = torch.cat(labels)
        return token_mean(label_loss(torch.cat(hidden), Head.of(self.student), every), len(every))


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
    """Train all weights of `model` in place on rows longer than before.

    A step's loss is the mean over all its learnt tokens. Dropout is off, in `model` from here on; its configuration
    keeps the teacher's value.
    Interrupted work goes on from the last whole checkpoint in `folder`. `report_to`: see `train`.

    Raises:
        UserError: the loss is not finite, or the processes cannot share a step evenly.
    """
    keep_activations(model.requires_grad_(True).train(), settings.activation_checkpointing is not True)
    loss = NextTokenLoss(model)
    shard_loss(loss, model)
    train(loss, rows, settings, folder, seed, bf16, report, report_to=report_to)
    model.eval()
