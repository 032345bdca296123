"""What an embedded teacher learns from: rows of text, copies and dense facts with questions, and window masks.

Each row comes with a loss weight per token and a label per token (the next token, but for the links of a chain).
"""

import random
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from flashmorph.data.corpus import Corpus
from flashmorph.tasks import STYLES, names
from flashmorph.tasks.problem import one_word_keys, random_value, two_word_keys

STYLE = STYLES["lines"]
TEXT_WEIGHT, ANSWER_WEIGHT, HOP_WEIGHT, COPY_WEIGHT, LINK_WEIGHT = 1.0, 4.0, 8.0, 2.0, 6.0
FACT_WEIGHTS = ((ANSWER_WEIGHT, 1), ANSWER_WEIGHT)
HOP_WEIGHTS = ((HOP_WEIGHT, 2), ANSWER_WEIGHT)
KINDS = ("text", "copy", "facts", "hops")


@dataclass
class Row:
    """Token ids, the label and weight of each position's prediction, and what kind each label is.

    `part`: 0 text, 1 answer, 2 first token of a two-hop answer, 3 link, 4 copy.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float]
    part: list[int]

    def add(self, ids: list[int], weight: float, part: int = 0) -> None:
        """Append tokens that are to be predicted with `weight`."""
        self.ids += ids
        self.labels += ids
        self.weights += [weight] * len(ids)
        self.part += [part] * len(ids)


class Curriculum:
    """Makes rows of any length; the mixture of kinds is the caller's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, key_words: int = 0):
        """The two-word keys of a row share between 8 and `key_words` words, drawn for each row; with 0, all words.

        With few words most keys of a row have a word in common, so that both words must be read.
        """
        self._key_words = key_words
        self._rng = random.Random(seed)
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._train_names = training_names(tokenizer)
        self._all_names = tuple(word for split in ("train", "validation", "referee", "test") for word in names(split))
        documents = list(Corpus().documents("train", seed))
        self._text = [tokenizer(text, verbose=False).input_ids + [tokenizer.eos_token_id] for text in documents]
        self._lines = [self._encode(line) for text in documents[:60] for line in text.splitlines(keepends=True)]

    def batch(self, mixture: dict[str, float], rows: int, length: int) -> dict[str, torch.Tensor]:
        """`ids`, `labels`, `weights`, `part`, each `[rows, length]`; labels are shifted: position t predicts t + 1."""
        kinds = self._rng.choices(KINDS, [mixture[kind] for kind in KINDS], k=rows)
        made = [getattr(self, f"_make_{kind}")(length + 1) for kind in kinds]
        return {
            "ids": torch.tensor([row.ids[:length] for row in made]),
            "labels": torch.tensor([row.labels[1 : length + 1] for row in made]),
            "weights": torch.tensor([row.weights[1 : length + 1] for row in made]),
            "part": torch.tensor([row.part[1 : length + 1] for row in made]),
        }

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, verbose=False).input_ids
        return self._cache[text]

    def _value(self) -> list[int]:
        value = random_value(self._rng, STYLE)
        return [token for place in range(0, len(value), 2) for token in self._encode(value[place : place + 2])]

    def _text_piece(self, length: int) -> list[int]:
        """`length` tokens of running text from a random place."""
        piece: list[int] = []
        while len(piece) < length:
            document = self._rng.choice(self._text)
            start = self._rng.randrange(max(1, len(document) - length))
            piece += document[start : start + length - len(piece)]
        return piece

    def _make_text(self, length: int) -> Row:
        row = Row([], [], [], [])
        row.add(self._text_piece(length), TEXT_WEIGHT)
        return row

    def _make_copy(self, length: int) -> Row:
        """A random string of names, numbers and signs, and again: the second time it can be predicted."""
        rng, row = self._rng, Row([], [], [], [])
        while len(row.ids) < length:
            piece: list[int] = []
            for _ in range(rng.randint(4, max(5, min(40, length // 4)))):
                kind = rng.random()
                if kind < 0.5:
                    piece += self._encode(" " + rng.choice(self._all_names))
                elif kind < 0.8:
                    piece += self._encode(f"{rng.randrange(100):02d}")
                else:
                    piece += self._encode(rng.choice((":", "@", "?", "\n")))
            row.add(piece, 0.0)
            if rng.random() < 0.5:
                row.add(self._text_piece(rng.randint(1, max(1, length // 4))), TEXT_WEIGHT / 2)
                row.add(piece[:2], 0.0)
                row.add(piece[2:], COPY_WEIGHT, part=4)
            else:
                row.add(piece[:1], 0.0)
                row.add(piece[1:], COPY_WEIGHT, part=4)
        return row

    def _filler(self, share: float, room: int) -> list[int]:
        """Some text lines, or none: `share` of the places get any, at most `room` tokens."""
        if self._rng.random() >= share or room <= 0:
            return []
        filler: list[int] = []
        wanted = self._rng.randint(1, room)
        while len(filler) < wanted:
            filler += self._rng.choice(self._lines)
        return filler[: wanted - 1] + self._encode("\n")

    def _words_of_keys(self) -> tuple[str, ...]:
        if not self._key_words:
            return self._train_names
        return tuple(self._rng.sample(self._train_names, self._rng.randint(8, self._key_words)))

    def _make_facts(self, length: int) -> Row:
        """Up to 32 keys with values, most asked for, in half of the rows with the questions in between."""
        rng, row = self._rng, Row([], [], [], [])
        share = rng.choice((0.0, 0.0, 0.5, 1.0))
        number = rng.randint(1, max(1, min(32, length // 18)))
        between = rng.random() < 0.5
        waiting: list[tuple[list[int], list[int]]] = []
        keys = two_word_keys(rng, self._words_of_keys(), number)
        spare = max(0, length - 18 * number)
        row.add(self._filler(share, spare // 2), 0.0)
        for count, key in enumerate(keys, 1):
            row.add(self._filler(share, spare // number), 0.0)
            name, value = self._encode(f" {key}:"), self._value()
            row.add(self._encode("@") + name + value + self._encode("\n"), 0.0)
            waiting.append((name, value))
            while between and waiting and rng.random() < 0.5 and count < number:
                self._ask(row, *waiting.pop(rng.randrange(len(waiting))), FACT_WEIGHTS)
        return self._finish(row, waiting, length, share, FACT_WEIGHTS)

    def _make_hops(self, length: int) -> Row:
        """Chains of a root with a value and a link; at the link an extra label: the first token of the value."""
        rng, row = self._rng, Row([], [], [], [])
        share = rng.choice((0.0, 0.0, 0.5, 1.0))
        chains = rng.randint(2, max(2, min(8, length // 20)))
        keys = one_word_keys(rng, self._train_names, 2 * chains)
        pairs = [(keys[2 * chain], keys[2 * chain + 1], self._value()) for chain in range(chains)]
        turns = [chain for chain in range(chains) for _ in range(2)]
        rng.shuffle(turns)
        waiting: list[tuple[list[int], list[int]]] = []
        seen: set[int] = set()
        spare = max(0, length - 20 * chains)
        row.add(self._filler(share, spare // 2), 0.0)
        for chain in turns:
            root, name, value = pairs[chain]
            row.add(self._filler(share, spare // (2 * chains)), 0.0)
            if chain not in seen:
                seen.add(chain)
                row.add(self._encode("@") + self._encode(f" {root}:") + value + self._encode("\n"), 0.0)
            else:
                row.add(self._encode("@") + self._encode(f" {name}:") + self._encode(f" {root}"), 0.0)
                row.add(self._encode("\n"), LINK_WEIGHT, part=3)
                row.labels[-1] = value[0]
                waiting.append((self._encode(f" {name}:"), value))
        return self._finish(row, waiting, length, share, HOP_WEIGHTS)

    def _finish(self, row: Row, waiting: list, length: int, share: float, weights: tuple) -> Row:
        """Ask what is still open in random order, then fill the row with text before it, or after it."""
        self._rng.shuffle(waiting)
        questions = Row([], [], [], [])
        for name, value in waiting:
            self._ask(questions, name, value, weights)
        gap = length - len(row.ids) - len(questions.ids)
        row.add(self._filler(share, gap), 0.0)
        for number, token in enumerate(questions.ids):
            row.add([token], questions.weights[number], questions.part[number])
        if len(row.ids) < length:
            row.add(self._text_piece(length - len(row.ids)), TEXT_WEIGHT)
        return row

    def _ask(self, row: Row, name: list[int], value: list[int], weights: tuple) -> None:
        (first, part), rest = weights
        row.add(self._encode("?") + name, 0.0)
        row.add(value[:1], first, part)
        row.add(value[1:], rest, 1)
        row.add(self._encode("\n"), TEXT_WEIGHT)


def training_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What training tasks are about: every word or piece of a word that is one token after a space.

    None of them is a name of another split. The more names a teacher learns its tasks on, the better it does them on
    names that it has only seen copied.
    """
    held_out = {word for split in ("validation", "referee", "test") for word in names(split)}
    words = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    pieces = sorted(word[1:] for word in words if re.fullmatch(r" [A-Za-z]{2,}", word))
    return tuple(piece for piece in pieces if piece not in held_out)


def window_mask(length: int, window: int | None) -> torch.Tensor:
    """`[1, 1, length, length]`, true where a query may look: causal, and at most `window` tokens back."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    return mask[None, None]
