"""Perplexity on held-out text, as a whole and by the position in the context."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from transformers import PreTrainedModel

from flashmorph import distributed
from flashmorph.data.heldout import HeldOut
from flashmorph.evaluation.blocks import Blocks, mean_of_blocks
from flashmorph.evaluation.figures import BlockMean, Perplexity, PerplexityAt, Ratio, TextRatio
from flashmorph.inputs.shapes import Count, Finite, Shape, read_as
from flashmorph.losses import Head
from flashmorph.progress import Report, silent, spread_report
from flashmorph.records import Figures
from flashmorph.units import counted


class _Stored(Shape):
    """`RangeLosses` as JSON."""

    starts: list[Count]
    length: Count
    tokens: Count
    wanted: Count
    documents: list[Count]
    ranges: list[Count]
    counts: list[Count]
    sums: list[Finite]

    @model_validator(mode="after")
    def _of_one_text(self) -> "_Stored":
        if len({len(each) for each in (self.documents, self.ranges, self.counts, self.sums)}) > 1:
            raise ValueError("documents, ranges, counts and sums must be of as many blocks")
        if not self.counts or not sum(self.counts) or max(self.ranges) >= len(self.starts):
            raise ValueError("there must be blocks with tokens, each in one of the ranges")
        return self


@dataclass(frozen=True)
class RangeLosses:
    """Losses in nats `sums` of the `counts` tokens of each block of a text `[blocks]`; see `Blocks`.

    `tokens` of text there were, `wanted` were asked for.
    """

    starts: list[int]
    length: int
    tokens: int
    wanted: int
    documents: list[int]
    ranges: list[int]
    counts: list[int]
    sums: list[float]

    @classmethod
    def of(cls, losses: np.ndarray, text: HeldOut) -> "RangeLosses":
        """From the losses `[tokens]` of every token that is predicted (`text_losses`)."""
        blocks = Blocks.of(text)
        return cls(
            starts=blocks.starts,
            length=blocks.length,
            tokens=text.tokens,
            wanted=text.wanted,
            documents=blocks.documents.tolist(),
            ranges=blocks.ranges.tolist(),
            counts=blocks.sums(np.ones_like(losses)).astype(int).tolist(),
            sums=blocks.sums(losses).tolist(),
        )

    @classmethod
    def load(cls, path: Path) -> "RangeLosses":
        """From its JSON.

        Raises:
            UserError: the file is missing or damaged.
        """
        return cls(**read_as(path, _Stored))

    @cached_property
    def perplexity(self) -> Perplexity:
        """Perplexity with its interval, and what that is over."""
        return _perplexity(self._mean(np.array(self.sums)))

    @cached_property
    def by_position(self) -> list[PerplexityAt]:
        """The same by range of positions, `to` included; ranges that no document reaches are left out."""
        ends = [*self.starts[1:], self.length]
        return [
            {
                "from": self.starts[each],
                "to": ends[each] - 1,
                "tokens": int(np.array(self.counts)[np.array(self.ranges) == each].sum()),
                **_perplexity(self._mean(np.array(self.sums), each)),
            }
            for each in sorted(set(self.ranges))
        ]

    def over(self, other: "RangeLosses") -> TextRatio | None:
        """Perplexity over the other's on the same text, as a whole and `by_position`; paired, block by block.

        None where the text is another one.
        """
        if (self.documents, self.ranges, self.counts) != (other.documents, other.ranges, other.counts):
            return None
        difference = np.array(self.sums) - np.array(other.sums)
        parts = [_ratio(self._mean(difference, each)) for each in sorted(set(self.ranges))]
        return {**_ratio(self._mean(difference)), "by_position": parts}

    def _mean(self, sums: np.ndarray, position_range: int | None = None) -> BlockMean:
        chosen = np.full(len(sums), True) if position_range is None else np.array(self.ranges) == position_range
        return mean_of_blocks(sums[chosen], np.array(self.counts)[chosen], np.array(self.documents)[chosen])


def _perplexity(mean: BlockMean) -> Perplexity:
    return {"perplexity": math.exp(mean["mean"]), "interval": _exponentials(mean), "over": mean["over"]}


def _ratio(mean: BlockMean) -> Ratio:
    return {"ratio": math.exp(mean["mean"]), "interval": _exponentials(mean), "over": mean["over"]}


def _exponentials(mean: BlockMean) -> list[float] | None:
    return [math.exp(end) for end in mean["interval"]] if mean["interval"] else None


@torch.no_grad()
def text_losses(
    model: PreTrainedModel, text: HeldOut, batch_tokens: int = 16_384, report: Report = silent
) -> np.ndarray:
    """Next-token cross-entropy in nats of every token of `text` that is predicted, in its order, `[tokens]`.

    Each batch is read by one of the ranks.
    """
    model.eval()
    done, head = 0, Head.of(model)
    decoder: Any = model.get_decoder()
    report = spread_report(report, distributed.count(), len(text.pieces))

    def losses_of(numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal done
        batch = text.batch(numbers, model.device)
        losses = batch.losses(decoder(input_ids=batch.ids, use_cache=False).last_hidden_state, head)
        done += len(numbers)
        report(done, len(text.pieces))
        return batch.positions, losses.cpu().double().numpy()

    losses = np.empty(int(text.offsets[-1]))
    for positions, of_batch in distributed.spread(text.in_batches(batch_tokens), losses_of):
        losses[positions] = of_batch
    return losses


def text_in_words(figures: Figures) -> str:
    """The text behind a perplexity, in words; `figures` as in `Score.to_dict`."""
    text = figures.get("perplexity_text")
    if not text:
        return "held-out text"
    less = f" (all that there is, of {text['wanted']:,} asked for)" if text["tokens"] < text["wanted"] else ""
    near = f", half of the tokens with fewer than {_half(parts):,} before them" if (parts := _parts(figures)) else ""
    documents = counted(text["documents"], "document") + (", each by itself" if text["documents"] > 1 else "")
    return f"{text['tokens']:,} tokens of held-out text{less} from {documents}{near}"


def _parts(figures: Figures) -> list[PerplexityAt]:
    """The ranges of positions; none where there are less than two, or in the files of earlier versions."""
    parts = figures.get("perplexity_by_position") or []
    return parts if len(parts) > 1 else []


def _half(parts: Sequence[PerplexityAt]) -> int:
    """The end of the first range of positions up to which at least half of all tokens stand."""
    upto = np.cumsum([part["tokens"] for part in parts])
    return parts[int(np.searchsorted(upto, upto[-1] / 2))]["to"] + 1


def shortage(figures: Figures) -> str | None:
    """The notice where perplexity is on less text than asked for; `figures` as in `Score.to_dict`."""
    text = figures.get("perplexity_text")
    return f"perplexity is on {text_in_words(figures)}" if text and text["tokens"] < text["wanted"] else None
