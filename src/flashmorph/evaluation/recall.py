"""Recall: greedy generation with the cache, exact match of the whole answer. Never a likelihood."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.progress import Report, silent
from flashmorph.tasks import Example

_MARGIN_TOKENS = 2


@torch.no_grad()
def answers_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_tokens: int = 16_384,
    report: Report = silent,
) -> list[bool]:
    """Whether `model` answers each example's last question exactly: its answer, then what must follow it.

    Prompts are padded on the left; `batch_tokens` is how many prompt tokens are run at once.
    """
    model.eval()
    right: list[bool] = []
    batch: list[Example] = []
    for number, example in enumerate(examples):
        batch.append(example)
        following = examples[number + 1] if number + 1 < len(examples) else None
        longest = max(len(row.input_ids) for row in [*batch, *([following] if following else [])])
        if following is None or longest * (len(batch) + 1) > batch_tokens:
            right += _answer_batch(model, tokenizer, batch)
            batch = []
            report(number + 1, len(examples))
    return right


def _answer_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]) -> list[bool]:
    prompts = [example.input_ids[: example.prompt_tokens] for example in batch]
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    answer_tokens = max(len(example.input_ids) - example.prompt_tokens for example in batch)
    generated = cast(Any, model).generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=answer_tokens + _MARGIN_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
    return [
        is_right(str(tokenizer.decode(row[width:], skip_special_tokens=True)), example)
        for row, example in zip(generated, batch, strict=True)
    ]


def is_right(generated: str, example: Example) -> bool:
    """A continuation is right when it starts with the answer and what must follow it."""
    return generated.startswith(example.answer + example.stop)
