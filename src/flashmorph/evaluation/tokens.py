"""Which tokens a model loses: its loss minus another's on the same text, by class of token.

Hybrids are reported to gain on content words and to lose nothing else than repeats, the less the longer the repeat
(Olmo Hybrid); a converted model that lost its recall shows it here, forward passes only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from flashmorph.evaluation.classes import CONTENT, KINDS, kinds, pieces_of, repeats
from flashmorph.evaluation.intervals import ratio_interval
from flashmorph.rows import Rows

SAMPLE_TOKENS = 512
_RUNS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))
_DISTANCES = ((1, 15), (16, 63), (64, 255), (256, 1023), (1024, 4095), (4096, None))
_COPY = 3


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of each class, by group and name, as masks `[rows, length - 1]` over every token but each row's first.

    `sample` is the beginning of the first row: the text of each token and its kind.
    """

    masks: dict[tuple[str, str], np.ndarray]
    sample: dict[str, list[str]]

    @classmethod
    def of(cls, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> "TokenClasses":
        """Classes of the tokens of `rows` of equal length."""
        found = []
        sample: dict[str, list[str]] = {}
        for row in range(len(rows)):
            ids = rows[row]["input_ids"]
            pieces = pieces_of(tokenizer, ids)
            named = kinds(pieces)
            found.append((np.asarray(named)[1:], *(part[1:] for part in repeats(ids))))
            sample = sample or {"tokens": pieces[1 : SAMPLE_TOKENS + 1], "kinds": named[1 : SAMPLE_TOKENS + 1]}
        kind, run, distance = (np.stack(parts) for parts in zip(*found, strict=True))
        masks = {("all", "all tokens"): np.ones_like(run, dtype=bool)}
        masks |= {("kind", name): kind == name for name in KINDS}
        masks |= {("occurrence", "first in the context"): run == 0, ("occurrence", "repeated"): run > 0}
        masks |= {("occurrence", f"{CONTENT}, {when}"): (kind == CONTENT) & mask
                  for when, mask in (("first", run == 0), ("repeated", run > 0))}  # fmt: skip
        masks |= {("completes a repeated n-gram of", _name(*ends)): _within(run, *ends) for ends in _RUNS}
        masks |= {
            (f"how far back (n of {_COPY} and more)", _name(*ends)): _within(distance, *ends) & (run >= _COPY)
            for ends in _DISTANCES
        }
        return cls({key: mask for key, mask in masks.items() if mask.any()}, sample)

    def compare(self, losses: np.ndarray, first: np.ndarray) -> dict[str, Any]:
        """Mean loss and mean difference `losses - first` in nats by class; both `[rows, length - 1]`.

        Intervals draw whole rows and are None where fewer than two rows have a token of the class.
        """
        difference = losses - first
        classes = []
        for (group, name), mask in self.masks.items():
            counts, sums = mask.sum(1), (difference * mask).sum(1)
            total = int(counts.sum())
            classes.append(
                {
                    "group": group,
                    "class": name,
                    "tokens": total,
                    "first": float(first[mask].mean()),
                    "difference": float(sums.sum() / total),
                    "interval": ratio_interval(sums, counts) if (counts > 0).sum() > 1 else None,
                }
            )
        size = len(self.sample["tokens"])
        shown = {"first": first[0, :size].tolist(), "difference": difference[0, :size].tolist()}
        return {"classes": classes, "sample": {**self.sample, **shown}}


def _within(values: np.ndarray, least: int, most: int | None) -> np.ndarray:
    return (values >= least) & (values <= (np.inf if most is None else most))


def _name(least: int, most: int | None) -> str:
    return f"{least:,} and more" if most is None else f"{least:,}" if least == most else f"{least:,}-{most:,}"
