"""The special tokens around a text: what the tokenizer puts before it, and what ends an answer."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError

_PROBES = ("a", "1", ".", " ")


def before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: `<s>` for Llama, none for Qwen.

    For Llama, Mistral and Phi the first token is the attention sink, so every separately attended piece of text must
    begin with it. What a tokenizer puts behind a text is left out, and so is a prefix space.
    """
    for probe in _PROBES:
        bare = list(tokenizer(probe, add_special_tokens=False, verbose=False).input_ids)
        if not bare:
            continue
        whole = list(tokenizer(probe, verbose=False).input_ids)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
    # No such text has tokens, or special tokens change those of a text.
    whole, special = list(tokenizer(_PROBES[0], verbose=False).input_ids), set(tokenizer.all_special_ids)
    return whole[: next((number for number, token in enumerate(whole) if token not in special), 0)]


def room_for_text(length: int, before: Sequence[int]) -> int:
    """Tokens of text in `length` tokens that begin with the special ones `before`.

    Raises:
        UserError: there is no room.
    """
    if length <= len(before):
        raise UserError(f"{length} tokens have no room for text behind the tokenizer's {len(before)} special tokens")
    return length - len(before)


def count_before(ids: Sequence[int], before: Sequence[int]) -> int:
    """The number of special tokens `before` at the start of a text: all of them, or none."""
    return len(before) if list(ids[: len(before)]) == list(before) else 0


def end_tokens(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> list[int]:
    """The tokens that end a teacher's answer, sorted.

    Those that its configurations (`config`, `generation_config`) name as `eos_token_id`, one or several, and the
    tokenizer's own.
    """
    named = [tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs if config)]
    return sorted({int(token) for each in named for token in _several(each)})


def _several(value: Any) -> Iterable[int]:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]
