"""The text that new tokens add to a prompt."""

import os
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_TAIL = 32


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], made: Sequence[int]) -> str:
    """The text of the tokens `made` behind those of `prompt`; special tokens have none.

    Tokens decoded alone read differently: SentencePiece takes the space off the first one, and a character may be
    divided among several. So the end of the prompt is decoded with them and taken away again, as incremental
    detokenisers do.
    """
    tail = list(prompt[-_TAIL:])
    before, whole = _decoded(tokenizer, tail), _decoded(tokenizer, [*tail, *made])
    return whole[len(os.path.commonprefix([before, whole])) :]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
