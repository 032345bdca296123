"""Text in blocks of tokens, and the intervals that draw whole documents, or blocks where there are few documents."""

from dataclasses import dataclass

import numpy as np

from flashmorph.data.heldout import HeldOut
from flashmorph.evaluation.figures import BlockMean
from flashmorph.evaluation.intervals import ratio_interval

FEWEST_DOCUMENTS = 20
"""Fewer make a bootstrap too narrow: then blocks of tokens are drawn."""
_LEAST_BLOCKS, _BLOCK_TOKENS = 40, 256
_FIRST_RANGE = 32


@dataclass(frozen=True)
class Blocks:
    """Tokens that are predicted, in blocks of neighbours in one piece and one range of positions.

    Range r holds the tokens from position `starts[r]` on; it is as long as everything before it, but for the last,
    which ends before `length`. `ranges` and `documents` `[blocks]` are each block's, `numbers` `[tokens]` is the block
    of each token.
    """

    starts: list[int]
    length: int
    ranges: np.ndarray
    documents: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, text: HeldOut) -> "Blocks":
        """The blocks of a text: at most 256 tokens each, and fewer where that would give less than forty."""
        starts = [1]
        while max(_FIRST_RANGE, 2 * starts[-1]) < text.length:
            starts.append(max(_FIRST_RANGE, 2 * starts[-1]))
        total = int(text.offsets[-1])
        most = max(1, min(_BLOCK_TOKENS, total // _LEAST_BLOCKS))
        numbers = np.empty(total, dtype=np.int64)
        ranges: list[int] = []
        documents: list[int] = []
        for piece, (first, offset) in enumerate(zip(text.firsts, text.offsets, strict=False)):
            for number, (start, end) in enumerate(zip(starts, [*starts[1:], text.length], strict=True)):
                for begin in range(max(start, first), min(end, len(text.pieces[piece])), most):
                    stop = min(begin + most, end, len(text.pieces[piece]))
                    numbers[offset + begin - first : offset + stop - first] = len(ranges)
                    ranges.append(number)
                    documents.append(text.documents[piece])
        return cls(starts, text.length, np.array(ranges), np.array(documents), numbers)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of `values` `[tokens]` in each block."""
        return np.bincount(self.numbers, values, minlength=len(self.ranges))


def mean_of_blocks(sums: np.ndarray, counts: np.ndarray, documents: np.ndarray) -> BlockMean:
    """The `mean` of tokens, from their sums and counts `[blocks]`, its 95 % `interval` and what that is `over`.

    Whole documents are drawn, since the tokens of a text depend on each other; blocks, where fewer than twenty
    documents have such a token. The interval is None with a single one.
    """
    sums, counts, documents = (each[counts > 0] for each in (sums, counts, documents))
    numbers, document = np.unique(documents, return_inverse=True)
    over = "documents" if len(numbers) >= FEWEST_DOCUMENTS else "blocks"
    mean = float(sums.sum() / counts.sum())
    if over == "documents":
        sums, counts = (np.bincount(document, each) for each in (sums, counts))
    return {"mean": mean, "interval": ratio_interval(sums, counts) if len(sums) > 1 else None, "over": over}
