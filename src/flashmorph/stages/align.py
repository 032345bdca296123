"""Alignment: every linear branch learns to reproduce its layer's attention output on the teacher's hidden states.

The layers are independent: layer l's input comes from the teacher's forward, not from the branches below it. The loss
is the sum over layers of `|M(h) - A(h)|^2 / |A(h)|^2` (stage 1 of FlashMorph and HALO, there without the division).
Both are summed over all tokens of a step, whatever its micro-batches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from flashmorph.data.isolation import Packed, apart, as_often_everywhere
from flashmorph.data.rows import Rows
from flashmorph.hosts import supports_varlen
from flashmorph.inputs.settings import Length, Rate, Tokens, TokensAtOnce
from flashmorph.mixers.mixer import LayerArguments
from flashmorph.model.layer import Branch, MorphableLayer, squares
from flashmorph.model.morphable import Morphable
from flashmorph.model.sharding import is_sharded
from flashmorph.progress import Report, silent
from flashmorph.stages.dropout import without_dropout
from flashmorph.stages.settings import IsolatedTrainSettings
from flashmorph.stages.training import train


class AlignSettings(IsolatedTrainSettings):
    """The published budget: 320M tokens at length 512, learning rate 1e-3 to 1e-5."""

    stage: ClassVar[str] = "align"
    tokens: Tokens = 320_000_000
    length: Length = 512
    batch_tokens: TokensAtOnce = 16_384
    learning_rate: Rate = 1e-3


class AlignmentLoss(nn.Module):
    """A teacher forward that also computes every branch's error.

    With `recompute` memory holds the input and output of each layer, and the activations of one branch at a time: each
    error is checkpointed. Neither input nor target carries a gradient, so none flows between layers.
    """

    def __init__(self, morphable: Morphable, recompute: bool = True):
        super().__init__()
        self._recompute = recompute
        self.morphable, self._is_sharded = morphable, is_sharded(morphable)
        without_dropout(morphable.model)
        self.terms = [[*branch.parameters()] for layer in morphable.layers for branch in layer.trained.values()]

    def forward(
        self, input_ids: torch.Tensor, starts: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The summed loss for `input_ids` `[batch, time]`, and each layer's part `[layers]`, detached.

        `starts` `[batch, time]` is True at the first token of each document (None: not isolated). Alignment has
        no targets, so `loss_mask` is ignored.
        """
        parts: list[torch.Tensor] = []
        packed = apart(input_ids, starts, supports_varlen(self.morphable.host, input_ids.device))
        if self._is_sharded:
            packed = as_often_everywhere(packed)
        for each in packed:

            def compare(
                layer: MorphableLayer,
                hidden: torch.Tensor,
                arguments: LayerArguments,
                output: torch.Tensor,
                each: Packed = each,
            ) -> None:
                for branch in layer.trained.values():
                    values = (branch, hidden.detach(), arguments, output.detach(), each)
                    again = self._recompute
                    parts.append(checkpoint(_squares, *values, use_reentrant=False) if again else _squares(*values))

            self.morphable(each.input_ids, boundaries=each.boundaries, observer=compare)
        difference, size = torch.stack(parts).unflatten(0, (len(packed), -1)).sum(0).unbind(1)
        errors = difference / size
        return {"loss": errors.sum(), "errors": errors.detach(), "sums": difference, "sizes": size.detach()}


def _squares(
    branch: Branch, hidden: torch.Tensor, arguments: LayerArguments, target: torch.Tensor, packed: Packed
) -> torch.Tensor:
    """`|M(h) - A(h)|^2` and `|A(h)|^2` over all tokens but padding, `[2]`."""
    return squares(packed.tokens(branch(hidden, arguments)), packed.tokens(target))


class _ClipEachBranch(TrainerCallback):
    """Clips each branch by itself: one with a large gradient must not slow down the others."""

    def __init__(self, morphable: Morphable, largest: float):
        self._branches, self._largest = morphable.branch_parameters(), largest

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for weights in self._branches:
            nn.utils.clip_grad_norm_(weights, self._largest)


def align(
    morphable: Morphable,
    rows: Rows,
    settings: AlignSettings,
    folder: Path,
    seed: int = 0,
    bf16: bool = False,
    report: Report = silent,
    report_to: Sequence[str] = (),
) -> None:
    """Train the branches of `morphable` in place; its other weights stay frozen.

    An interrupted call continues from the last complete checkpoint in `folder`.

    Args:
        morphable: The teacher with its branches, these in float32; unsharded or sharded by `shard_morphable`.
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
    for weights in morphable.branch_parameters():
        for weight in weights:
            weight.requires_grad_(True)
    clip = _ClipEachBranch(morphable, settings.max_grad_norm)
    loss = AlignmentLoss(morphable, settings.activation_checkpointing is not False)
    train(loss, rows, settings, folder, seed, bf16, report, [clip], clip=False, report_to=report_to)
    for weights in morphable.branch_parameters():
        for weight in weights:
            weight.requires_grad_(False)


@torch.no_grad()
def alignment_errors(morphable: Morphable, input_ids: torch.Tensor, starts: torch.Tensor | None = None) -> list[float]:
    """Relative error of each layer's branch on `input_ids` `[batch, time]`: a branch with output 0 has 1.

    `starts` `[batch, time]` is True at the first token of each document (None: they are not isolated). Rows are run one
    by one.
    """
    loss, sums, sizes = AlignmentLoss(morphable), torch.zeros(()), torch.zeros(())
    for number in range(len(input_ids)):
        part = slice(number, number + 1)
        own = None if starts is None else starts[part].to(morphable.device)
        found = loss(input_ids[part].to(morphable.device), own)
        sums, sizes = sums + found["sums"].cpu(), sizes + found["sizes"].cpu()
    return (sums / sizes).tolist()
