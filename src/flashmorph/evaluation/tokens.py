"""Which tokens a model loses: its loss minus another's on the same text, by class of token.

Hybrids are reported to gain on content words and to lose nothing else than repeats, the less the longer the repeat
(Olmo Hybrid); a converted model that lost its recall shows it here, forward passes only.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from flashmorph.data.heldout import HeldOut
from flashmorph.evaluation.blocks import Blocks, mean_of_blocks
from flashmorph.evaluation.classes import CONTENT, KINDS, kinds, pieces_of, repeats
from flashmorph.records import Figures

SAMPLE_TOKENS = 512
_RUNS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))
_DISTANCES = ((1, 15), (16, 63), (64, 255), (256, 1023), (1024, 4095), (4096, None))
_COPY = 3


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of each class, by group and name, as masks `[tokens]` over every token of a text that is predicted.

    `sample` is the beginning of the longest piece: the text of each token and its kind; its tokens stand at
    `sample_at`. `blocks` are what intervals draw.
    """

    masks: dict[tuple[str, str], np.ndarray]
    sample: dict[str, list[str]]
    sample_at: slice
    blocks: Blocks

    @classmethod
    def of(cls, text: HeldOut, tokenizer: PreTrainedTokenizerBase) -> "TokenClasses":
        """Classes of the tokens of `text`; what is repeated is so within a piece."""
        found, longest = [], max(range(len(text.pieces)), key=lambda piece: len(text.pieces[piece]))
        sample: dict[str, list[str]] = {}
        for number, (ids, special, first) in enumerate(zip(text.pieces, text.special, text.firsts, strict=True)):
            words = pieces_of(tokenizer, ids[special:])
            shown, named = words[first - special :], kinds(words)[first - special :]
            found.append((np.asarray(named), *(part[first:] for part in repeats(ids))))
            if number == longest:
                sample = {"tokens": shown[:SAMPLE_TOKENS], "kinds": named[:SAMPLE_TOKENS]}
        kind, run, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
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
        start = int(text.offsets[longest])
        sample_at = slice(start, start + len(sample["tokens"]))
        return cls({key: mask for key, mask in masks.items() if mask.any()}, sample, sample_at, Blocks.of(text))

    def compare(self, losses: np.ndarray, first: np.ndarray) -> Figures:
        """Mean loss and mean difference `losses - first` in nats by class; both `[tokens]`.

        Each interval names what it is `over` (`mean_of_blocks`).
        """
        difference = losses - first
        classes = []
        for (group, name), mask in self.masks.items():
            sums, counts = self.blocks.sums(difference * mask), self.blocks.sums(mask)
            mean = mean_of_blocks(sums, counts, self.blocks.documents)
            classes.append(
                {
                    "group": group,
                    "class": name,
                    "tokens": int(mask.sum()),
                    "first": float(first[mask].mean()),
                    "difference": mean["mean"],
                    "interval": mean["interval"],
                    "over": mean["over"],
                }
            )
        shown = {"first": first[self.sample_at].tolist(), "difference": difference[self.sample_at].tolist()}
        return {"classes": classes, "sample": {**self.sample, **shown}}


def _within(values: np.ndarray, least: int, most: int | None) -> np.ndarray:
    return (values >= least) & (values <= (np.inf if most is None else most))


def _name(least: int, most: int | None) -> str:
    return f"{least:,} and more" if most is None else f"{least:,}" if least == most else f"{least:,}-{most:,}"
