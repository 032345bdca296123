"""Perplexity on held-out text."""

import math

import torch
from transformers import PreTrainedModel

from flashmorph.corpus import Rows
from flashmorph.losses import Head, token_losses
from flashmorph.progress import Report, silent


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
