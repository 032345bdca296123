"""The settings of a stage that trains, and how its steps are divided among processes and micro-batches."""

import itertools
import math
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from flashmorph.errors import UserError
from flashmorph.inputs.settings import FinalRate, Length, Rate, Settings, Tokens, TokensAtOnce
from flashmorph.records import SettingValues

_NOT_IN_RESULTS = {"tokens", "batch_tokens", "micro_batch_tokens", "activation_checkpointing", "checkpoint_steps"}


class Division(NamedTuple):
    """How a step is divided among ranks: each runs micro-batches of `rows` rows, `accumulation` of them.

    If there are more ranks than micro-batches, `sharing` consecutive ranks share one.
    """

    rows: int
    accumulation: int
    sharing: int


class TrainSettings(Settings):
    """Tokens, batch, learning rate and checkpoint interval of a training stage."""

    stage: ClassVar[str] = "training"
    tokens: Tokens = Field(description="tokens to train on, in all")
    length: Length = Field(description="tokens in a row")
    batch_tokens: TokensAtOnce = Field(description="tokens in a step, over all devices")
    micro_batch_tokens: TokensAtOnce | Literal["auto"] | None = Field(
        default="auto", description="tokens at once on one device; `auto`: from its memory, null: a whole step"
    )
    activation_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="compute layers (in `align`: branches) again, not keep them; `auto`: if memory asks for it",
    )
    retrieval_share: float = Field(default=0.0, ge=0, le=1, description="share of rows that are retrieval questions")
    learning_rate: Rate
    final_learning_rate: FinalRate = 1e-5
    warmup_steps: int = Field(default=50, ge=0, le=10**9)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    checkpoint_steps: int = Field(default=500, gt=0, le=10**9, description="steps between two checkpoints")

    @property
    def keeps_apart(self) -> bool:
        """Whether documents in one row are isolated from each other."""
        return False

    @property
    def takes_long_documents(self) -> bool:
        """Whether only documents that fill a row on their own are used."""
        return False

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.tokens // self.batch_tokens)

    @property
    def rows(self) -> int:
        """Rows in all steps."""
        return self.steps * self.batch_rows

    @property
    def batch_rows(self) -> int:
        """Rows in a step."""
        return max(1, self.batch_tokens // self.length)

    @property
    def tokens_run(self) -> int:
        """Tokens in all steps: `tokens` without the remainder that does not fill a step."""
        return self.rows * self.length

    @property
    def questions(self) -> int:
        """Rows that are retrieval questions."""
        return round(self.retrieval_share * self.rows)

    def what_counts(self, tokens: bool = True) -> SettingValues:
        """The settings that the result depends on, as JSON values; without `tokens` also without the steps.

        Settings that only trade time for memory and the checkpoint interval are left out.
        """
        shape = {"batch_rows": self.batch_rows, **({"steps": self.steps} if tokens else {})}
        return {**self.model_dump(mode="json", exclude=_NOT_IN_RESULTS), **shape}

    def division(self, processes: int) -> Division:
        """A step divided among `processes` ranks, with the same micro-batches as on one rank.

        A micro-batch has `micro_batch_tokens` tokens, or the whole batch (also for `auto` until `estimate/auto.py` has
        resolved it). Several ranks share a micro-batch only if there are fewer micro-batches than ranks.

        Raises:
            UserError: the rows of a step do not divide evenly.
        """
        if division := self._divided(self.batch_rows, processes):
            return division
        enough = next(rows for rows in itertools.count(self.batch_rows) if self._divided(rows, processes))
        raise UserError(
            f"{self.stage}.batch_tokens={self.batch_tokens} is {self.batch_rows} rows of {self.length:,} tokens in a "
            f"step, which {processes} processes cannot share evenly; with {enough * self.length} they can"
        )

    def _divided(self, batch_rows: int, processes: int) -> Division | None:
        at_once = self.micro_batch_tokens if isinstance(self.micro_batch_tokens, int) else batch_rows * self.length
        most = max(1, at_once // self.length)
        batches = _smallest_divisor(batch_rows, -(-batch_rows // most))
        pieces = math.lcm(batches, processes)
        if batch_rows % pieces:
            return None
        return Division(batch_rows // pieces, pieces // processes, pieces // batches)


def _smallest_divisor(number: int, least: int) -> int:
    """The smallest divisor of `number` that is not below `least`."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return min(divisor for each in small for divisor in (each, number // each) if divisor >= least)


class IsolatedTrainSettings(TrainSettings):
    """`TrainSettings` of a stage that may isolate the documents in one row."""

    isolate_documents: bool = Field(default=True, description="documents in one row do not see each other")

    @property
    def keeps_apart(self) -> bool:
        """See `TrainSettings`."""
        return self.isolate_documents
