"""What a model can do: recall by task, perplexity, cache. One `Score` a model, comparable question by question."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.evaluation.intervals import paired_interval, share_interval
from flashmorph.evaluation.perplexity import RangeLosses, perplexity, perplexity_of_rows, text_losses
from flashmorph.evaluation.recall import answers_right
from flashmorph.progress import Report, silent
from flashmorph.rows import Rows
from flashmorph.tasks import Example


class EvaluateSettings(BaseModel):
    """What is asked, and of how long a context."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    questions: int = Field(default=200, gt=0, description="questions a task")
    length: int = Field(default=4096, gt=1, description="context length in tokens")
    perplexity_tokens: int = Field(default=262_144, gt=1, description="held-out tokens that perplexity is measured on")
    batch_tokens: int = Field(default=32_768, gt=0, description="tokens run at once")
    chat_template: bool = Field(
        default=False, description="ask through the teacher's chat template (for teachers that follow instructions)"
    )


@dataclass(frozen=True)
class Score:
    """`right[task]` tells question by question whether the answer was right; `text` how perplexity came about."""

    right: dict[str, list[bool]]
    perplexity: float
    cache_bytes: dict[str, int] = field(default_factory=dict)
    text: RangeLosses | None = None

    @property
    def recall(self) -> float:
        """Mean over tasks of the share of right answers."""
        return float(np.mean([np.mean(right) for right in self.right.values()]))

    def to_dict(self) -> dict[str, Any]:
        """The figures with their 95 % intervals."""
        pooled = [hit for right in self.right.values() for hit in right]
        text = {}
        if self.text:
            interval = perplexity_of_rows(self.text.rows)["interval"]
            text = {"perplexity_interval": interval, "perplexity_by_position": self.text.to_list()}
        return {
            "recall": self.recall,
            "recall_interval": share_interval(pooled),
            "recall_by_task": {
                task: {"recall": float(np.mean(right)), "interval": share_interval(right), "questions": len(right)}
                for task, right in self.right.items()
            },
            "perplexity": self.perplexity,
            **text,
            "cache_bytes": self.cache_bytes,
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, Sequence[Example]],
    rows: Rows,
    settings: EvaluateSettings,
    cache_bytes: dict[str, int] | None = None,
    report: Report = silent,
) -> Score:
    """Recall on `questions` (a list for each task) and perplexity on `rows`."""
    total = sum(map(len, questions.values())) + len(rows)
    done = 0
    right = {}

    def report_all(step: float, steps: float, **figures: float) -> None:
        report(done + step, total, **figures)

    for task, examples in questions.items():
        right[task] = answers_right(model, tokenizer, examples, settings.batch_tokens, report_all)
        done += len(examples)
    losses = text_losses(model, rows, settings.batch_tokens, report_all)
    return Score(right, perplexity(losses), cache_bytes or {}, RangeLosses.of(losses))


def recall_difference(first: Score, second: Score) -> dict[str, Any]:
    """Recall of `first` minus that of `second`, with the paired 95 % interval."""
    pairs = [(first.right[task], second.right[task]) for task in first.right]
    low, high = paired_interval([one for one, _ in pairs], [other for _, other in pairs])
    return {"difference": first.recall - second.recall, "interval": (low, high)}


def perplexity_ratio(first: Score, second: Score) -> dict[str, Any] | None:
    """Perplexity of `first` over that of `second` on the same rows, as a whole and by position.

    The 95 % intervals are paired over rows; they are None with a single row. None where either was scored without its
    losses.
    """
    if not first.text or not second.text:
        return None
    pairs = zip(zip(*first.text.means, strict=True), zip(*second.text.means, strict=True), strict=True)
    return {**_ratio(first.text.rows, second.text.rows), "by_position": [_ratio(one, other) for one, other in pairs]}


def _ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    interval = [math.exp(end) for end in paired_interval([one], [other])] if len(one) > 1 else None
    return {"ratio": math.exp(float(np.mean(one) - np.mean(other))), "interval": interval}
