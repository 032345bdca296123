"""Recall: greedy generation with the cache, judged by the text that comes out. Never a likelihood."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from flashmorph import distributed
from flashmorph.evaluation.greedy import greedy
from flashmorph.progress import Report, silent, spread_report
from flashmorph.tasks import Example, Prompt
from flashmorph.tokens.continuation import continuation

_MOST_MASKED = 2**31
"""Pairs of tokens in a padded batch: its masks of all pairs take three bytes each."""


def answers_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_tokens: int = 16_384,
    report: Report = silent,
) -> list[bool]:
    """Whether `model` answers each example's last question exactly: its answer, then what must follow it or the end.

    `batch_tokens` is how many prompt tokens are run at once.
    """
    prompts = [example.prompt for example in examples]
    return [score == 1 for score in answer_scores(model, tokenizer, prompts, batch_tokens, report)]


@torch.no_grad()
def answer_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch_tokens: int = 16_384,
    report: Report = silent,
) -> list[float]:
    """The share of its references that `model`'s greedy continuation of each prompt holds.

    Prompts are padded on the left; `batch_tokens` is how many prompt tokens are run at once. Each prompt is read once,
    by one of the ranks.
    """
    model.eval()
    done, report = 0, spread_report(report, distributed.count(), len(prompts))
    with greedy(model, tokenizer) as config:

        def scores_of(batch: list[Prompt]) -> list[float]:
            nonlocal done
            scores = _answer_batch(model, tokenizer, config, batch)
            done += len(batch)
            report(done, len(prompts))
            return scores

        of_batches = distributed.spread(_batches(prompts, batch_tokens), scores_of)
    return [score for scores in of_batches for score in scores]


def _batches(prompts: Iterable[Prompt], batch_tokens: int) -> Iterator[list[Prompt]]:
    """Prompts in order, as many at once as the limits of padded tokens and of their pairs allow; at least one."""
    batch: list[Prompt] = []
    for prompt in prompts:
        longest, rows = max(len(row.input_ids) for row in [*batch, prompt]), len(batch) + 1
        if batch and (longest * rows > batch_tokens or longest**2 * rows > _MOST_MASKED):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, batch: Sequence[Prompt]
) -> list[float]:
    width = max(len(prompt.input_ids) for prompt in batch)
    pad, ends = config.pad_token_id, config.eos_token_id or []
    ids = torch.tensor([[pad] * (width - len(prompt.input_ids)) + prompt.input_ids for prompt in batch])
    mask = torch.tensor([[0] * (width - len(prompt.input_ids)) + [1] * len(prompt.input_ids) for prompt in batch])
    judge = _Judge(tokenizer, batch, width, set(ends))
    generated = cast(Any, model).generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        max_new_tokens=max(prompt.answer_tokens for prompt in batch),
        stopping_criteria=StoppingCriteriaList([judge]),
    )
    return judge.scores(generated)


class _Judge(StoppingCriteria):
    """Scores continuations, and ends those that hold all of their references: nothing can make them worse."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Prompt], width: int, ends: set[int]):
        self._tokenizer, self._batch, self._width, self._ends = tokenizer, batch, width, ends

    def scores(self, generated: torch.Tensor) -> list[float]:
        """One score a row of `generated` `[batch, width + new tokens]`."""
        rows = generated[:, self._width :].tolist()
        return [self._score(row, prompt) for row, prompt in zip(rows, self._batch, strict=True)]

    def _score(self, row: list[int], prompt: Prompt) -> float:
        """The score of a row, cut at its end token and its most tokens: it continues while others are unfinished."""
        made = row[: prompt.answer_tokens]
        end = next((position for position, token in enumerate(made) if token in self._ends), None)
        text = continuation(self._tokenizer, prompt.input_ids, made[:end])
        return prompt.score(text, ended=end is not None)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = [score == 1 for score in self.scores(input_ids)]
        return torch.tensor(done, device=input_ids.device)
