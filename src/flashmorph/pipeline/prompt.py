"""Generation from a prompt."""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

from flashmorph.convert.teacher import open_model
from flashmorph.errors import UserError
from flashmorph.evaluation.greedy import greedy
from flashmorph.tokens.continuation import continuation
from flashmorph.tokens.special_tokens import before_text

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def continue_prompt(
    name: str,
    prompt: str,
    max_new_tokens: int,
    device: torch.device,
    say: Callable[[str], None] = _LOG.warning,
    allow_unused: bool = False,
) -> str:
    """Greedy continuation of `prompt`, with the cache.

    Args:
        name: Of the model: a folder, or a checkpoint of the hub.
        prompt: Text, of at least one token with the special tokens before it.
        max_new_tokens: The most tokens that are generated.
        device: Where the model runs.
        say: Called with each notice about stored weights that are not used.
        allow_unused: Whether such weights are reported instead of refused.

    Raises:
        UserError: see `open_model`; or the prompt is empty, or with what is to be generated longer than the model's
            contexts.
    """
    model, tokenizer = open_model(name, device, say, allow_unused)
    ids = [*before_text(tokenizer), *tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids]
    if not ids:
        raise UserError("the prompt is empty; give some text to continue")
    limit = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > limit:
        raise UserError(
            f"{name} takes contexts of at most {limit:,} tokens: the prompt has {len(ids):,}, so that "
            f"--max-new-tokens can be {max(0, limit - len(ids)):,} at most; it is {max_new_tokens:,}"
        )
    input_ids = torch.tensor([ids], device=device)
    with greedy(model, tokenizer) as config:
        generated = cast(Any, model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            max_new_tokens=max_new_tokens,
        )
    return continuation(tokenizer, ids, generated[0, len(ids) :].tolist())
