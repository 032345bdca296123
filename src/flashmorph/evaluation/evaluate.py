"""Recall by task, perplexity and cache of a model, as a `Score` that is comparable question by question."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmorph.data.heldout import HeldOut
from flashmorph.devices import use_bf16
from flashmorph.evaluation.figures import Difference, TextRatio, TextSize
from flashmorph.evaluation.intervals import paired_share_interval, share_interval
from flashmorph.evaluation.perplexity import RangeLosses, text_losses
from flashmorph.evaluation.recall import answers_right
from flashmorph.inputs.settings import Length, Many, Settings, Tokens, TokensAtOnce
from flashmorph.progress import Report, continued, silent
from flashmorph.records import Figures
from flashmorph.tasks import Example

_USUAL_TOKENS = 32_768


class EvaluateSettings(Settings):
    """Number and length of questions, and the text of perplexity."""

    questions: Many = Field(default=200, description="questions a task")
    length: Length = Field(default=4096, description="context length in tokens")
    perplexity_tokens: Tokens = Field(default=262_144, gt=1, description="held-out tokens of perplexity, at most")
    documents: Literal["any", "long"] = Field(
        default="any", description="the text of perplexity; `long`: only documents that fill `length`"
    )
    batch_tokens: TokensAtOnce | Literal["auto"] = Field(
        default="auto", description="tokens run at once; `auto`: from the device's memory"
    )
    chat_template: bool = Field(
        default=False, description="ask through the teacher's chat template (for teachers that follow instructions)"
    )
    dtype: Literal["auto", "fast", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the models; `auto`: float32 on a CPU, elsewhere the checkpoint's own; `fast`: the checkpoint's "
        "own on CPUs with fast bfloat16 products too",
    )

    @property
    def takes_long_documents(self) -> bool:
        """Whether only documents that fill `length` are used."""
        return self.documents == "long"

    def dtype_on(self, kind: str) -> str:
        """What `auto` and `fast` mean on this kind of device (`auto` is then the checkpoint's own)."""
        if self.dtype not in ("auto", "fast"):
            return self.dtype
        own = kind != "cpu" or (self.dtype == "fast" and use_bf16(torch.device("cpu")))
        return "auto" if own else "float32"

    @property
    def tokens_at_once(self) -> int:
        """Tokens run at once; a default until `auto` is resolved (`estimate/auto.py`)."""
        return _USUAL_TOKENS if self.batch_tokens == "auto" else self.batch_tokens


@dataclass(frozen=True)
class Score:
    """`right[task]` has for each question whether the answer was right; `text` has the losses behind the perplexity.

    `losses` `[tokens]`, where they are kept, are those of all predicted tokens in nats.
    """

    right: dict[str, list[bool]]
    perplexity: float
    cache_bytes: dict[str, int]
    text: RangeLosses
    losses: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def recall(self) -> float:
        """Mean over tasks of the share of right answers."""
        return float(np.mean([np.mean(right) for right in self.right.values()]))

    @property
    def text_read(self) -> TextSize:
        """The size of the text behind the perplexity, which may be less than was wanted."""
        documents = len(set(self.text.documents))
        return {"tokens": self.text.tokens, "wanted": self.text.wanted, "documents": documents}

    def to_dict(self) -> Figures:
        """The figures with their 95 % intervals."""
        pooled = [hit for right in self.right.values() for hit in right]
        perplexity = self.text.perplexity
        return {
            "recall": self.recall,
            "recall_interval": share_interval(pooled),
            "recall_by_task": {
                task: {"recall": float(np.mean(right)), "interval": share_interval(right), "questions": len(right)}
                for task, right in self.right.items()
            },
            "perplexity": self.perplexity,
            "perplexity_interval": perplexity["interval"],
            "perplexity_over": perplexity["over"],
            "perplexity_text": self.text_read,
            "perplexity_by_position": self.text.by_position,
            "cache_bytes": self.cache_bytes,
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, Sequence[Example]],
    text: HeldOut,
    settings: EvaluateSettings,
    cache_bytes: dict[str, int] | None = None,
    report: Report = silent,
) -> Score:
    """Recall on `questions` and perplexity on `text`.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: The teacher's.
        questions: The examples of each task, by its name.
        text: Held-out text.
        settings: Tokens run at once.
        cache_bytes: The cache of one sequence in bytes by its length, as in the record.
        report: Called with the questions and pieces of text done, and all of them.
    """
    total = sum(map(len, questions.values())) + len(text.pieces)
    done = 0
    right = {}

    for task, examples in questions.items():
        right[task] = answers_right(model, tokenizer, examples, settings.tokens_at_once, continued(report, done, total))
        done += len(examples)
    losses = text_losses(model, text, settings.tokens_at_once, continued(report, done, total))
    by_range = RangeLosses.of(losses, text)
    return Score(right, by_range.perplexity["perplexity"], cache_bytes or {}, by_range, losses)


def recall_difference(first: Score, second: Score) -> Difference:
    """Recall of `first` minus that of `second`, with the paired 95 % interval."""
    pairs = [(first.right[task], second.right[task]) for task in first.right]
    low, high = paired_share_interval([one for one, _ in pairs], [other for _, other in pairs])
    return {"difference": first.recall - second.recall, "interval": (low, high)}


def perplexity_ratio(first: Score, second: Score) -> TextRatio | None:
    """Perplexity of `first` over that of `second` on the same text, overall and by position.

    The 95 % intervals are paired; see `RangeLosses.over`. None where they were scored on different texts.
    """
    return first.text.over(second.text)
