"""Perplexity on held-out text, as a whole and by the position in the context."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from flashmorph.evaluation.intervals import mean_interval
from flashmorph.losses import Head, token_losses
from flashmorph.progress import Report, silent
from flashmorph.rows import Rows

_FIRST_RANGE = 32


@dataclass(frozen=True)
class RangeLosses:
    """Mean losses in nats `means` `[rows][ranges]`; range r holds the tokens from position `starts[r]` on.

    Each range is as long as everything before it, but for the last, which ends before `length`.
    """

    starts: list[int]
    length: int
    means: list[list[float]]

    @classmethod
    def of(cls, losses: torch.Tensor) -> "RangeLosses":
        """From the losses of every token but the first, `[rows, length - 1]`."""
        length = losses.shape[1] + 1
        starts = [1]
        while max(_FIRST_RANGE, 2 * starts[-1]) < length:
            starts.append(max(_FIRST_RANGE, 2 * starts[-1]))
        parts = [
            losses[:, start - 1 : end - 1].double().mean(1)
            for start, end in zip(starts, [*starts[1:], length], strict=True)
        ]
        return cls(starts, length, torch.stack(parts, 1).tolist())

    @property
    def rows(self) -> list[float]:
        """The mean loss of each row."""
        sizes = np.diff([*self.starts, self.length])
        return (np.asarray(self.means) @ sizes / sizes.sum()).tolist()

    def to_list(self) -> list[dict[str, Any]]:
        """Perplexity with its interval by range, `to` included."""
        figures = []
        for place, (start, end) in enumerate(zip(self.starts, [*self.starts[1:], self.length], strict=True)):
            losses = [row[place] for row in self.means]
            figures.append({"from": start, "to": end - 1, **perplexity_of_rows(losses)})
        return figures


def perplexity_of_rows(losses: list[float]) -> dict[str, Any]:
    """Perplexity of rows of equal length from their mean losses; the interval, over rows, needs at least two."""
    interval = [math.exp(end) for end in mean_interval(losses)] if len(losses) > 1 else None
    return {"perplexity": math.exp(float(np.mean(losses))), "interval": interval}


@torch.no_grad()
def text_losses(
    model: PreTrainedModel, rows: Rows, batch_tokens: int = 16_384, report: Report = silent
) -> torch.Tensor:
    """Next-token cross-entropy in nats of every token of `rows` but the first, `[rows, length - 1]`."""
    model.eval()
    losses = []
    length = len(rows[0]["input_ids"])
    size = max(1, batch_tokens // length)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        ids = torch.tensor([rows[row]["input_ids"] for row in range(start, stop)], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = token_losses(hidden.flatten(0, 1), Head.of(model), ids[:, 1:].flatten())
        losses.append(loss.view(stop - start, -1).cpu())
        report(stop, len(rows))
    return torch.cat(losses)


def perplexity(losses: torch.Tensor) -> float:
    """`exp` of the mean loss."""
    return math.exp(losses.double().mean().item())
