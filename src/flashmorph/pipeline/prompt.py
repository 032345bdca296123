"""A model goes on from a prompt."""

from collections.abc import Callable
from typing import Any, cast

import torch

from flashmorph.convert.teacher import open_model
from flashmorph.errors import UserError
from flashmorph.evaluation.greedy import greedy
from flashmorph.tokens.continuation import continuation
from flashmorph.tokens.special_tokens import before_text


@torch.no_grad()
def continue_prompt(
    name: str,
    prompt: str,
    max_new_tokens: int,
    device: torch.device,
    tell: Callable[[str], None] = lambda notice: None,
    allow_unused: bool = False,
) -> str:
    """Greedy continuation of `prompt`, with the cache; `tell` and `allow_unused` as in `open_model`.

    Raises:
        UserError: see `open_model`; or the prompt is empty.
    """
    model, tokenizer = open_model(name, device, tell, allow_unused)
    ids = [*before_text(tokenizer), *tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids]
    if not ids:
        raise UserError("the prompt is empty; give some text to go on from")
    given = torch.tensor([ids], device=device)
    with greedy(model, tokenizer) as config:
        made = cast(Any, model).generate(
            given, attention_mask=torch.ones_like(given), generation_config=config, max_new_tokens=max_new_tokens
        )
    return continuation(tokenizer, ids, made[0, len(ids) :].tolist())
