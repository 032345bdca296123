"""Text as tokens, and which of them stand where in it."""

import os

import numpy as np
from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of `text` without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def ends_of(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The end of each token in `text`, in characters; spread evenly if the tokenizer has no offsets."""
    if not tokenizer.is_fast:
        return np.linspace(0, len(text), len(encode(tokenizer, text)) + 1)[1:].astype(np.int64)
    return _with_offsets(tokenizer, text)[2]


def _with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Tokens, where each begins, and where it ends: never before the one in front."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return list(encoded["input_ids"]), offsets[:, 0], np.maximum.accumulate(offsets[:, 1])


class EncodedText:
    """The tokens `ids` of a whole text, and which of them stand where."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self._tokenizer, self._text = tokenizer, text
        if tokenizer.is_fast:
            self.ids, self._begins, self._ends = _with_offsets(tokenizer, text)
        else:
            self.ids = encode(tokenizer, text)

    def at(self, position: int) -> tuple[int, bool]:
        """Index of the first token that reaches into the text after `position` (in characters), and whether it begins
        exactly there."""
        if position <= 0:
            return 0, True
        if self._tokenizer.is_fast:
            token = int(np.searchsorted(self._ends, position, side="right"))
            if 0 < token < len(self.ids) and position < self._begins[token] and self._ends_in_space(token - 1):
                return token - 1, False
            return token, token == 0 or int(self._ends[token - 1]) == position
        # Without offsets: the tokens that the text up to there shares with the whole end before it.
        before = encode(self._tokenizer, self._text[:position])
        token = len(os.path.commonprefix([before, self.ids]))
        return token, token == len(before)

    def _ends_in_space(self, token: int) -> bool:
        """Byte-level tokenizers may leave white space out of a token's offsets."""
        return str(self._tokenizer.decode([self.ids[token]], clean_up_tokenization_spaces=False))[-1:].isspace()

    def reaching_into(self, begin: int, end: int) -> tuple[int, int]:
        """From which token to which the text from `begin` to `end` goes, those that it shares among them."""
        (first, _), (last, clean) = self.at(begin), self.at(end)
        return first, last + (not clean)

    def within(self, begin: int, end: int) -> tuple[int, int]:
        """The same without tokens that reach out of it."""
        (first, clean), (last, _) = self.at(begin), self.at(end)
        return first + (not clean), last
