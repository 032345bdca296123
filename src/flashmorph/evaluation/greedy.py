"""Greedy decoding, whatever the checkpoint's generation_config.json has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.tokens.special_tokens import end_tokens


@contextmanager
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[GenerationConfig]:
    """While this lasts, `model` generates by the largest logit alone, with the cache; afterwards as before.

    Only the tokens that end an answer and the padding come from checkpoint and tokenizer. The configuration is swapped
    and not just given to `generate`, which takes what is not set in it from the model's own.
    """
    own, holder = getattr(model, "generation_config", None), cast(Any, model)
    ends = end_tokens(tokenizer, model.config, own)
    holder.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=_padding(model, tokenizer, ends),
    )
    try:
        yield holder.generation_config
    finally:
        holder.generation_config = own


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """A token that the model has an embedding for; it is never attended to."""
    size = cast(Any, model.get_input_embeddings()).weight.shape[0]
    named = [tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None), *ends, 0]
    return next(int(token) for token in named if isinstance(token, int) and 0 <= token < size)
