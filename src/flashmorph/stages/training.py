"""What all training stages share: settings, `transformers.Trainer` made safe to kill, and its progress."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from flashmorph import ranks
from flashmorph.errors import UserError
from flashmorph.progress import Report
from flashmorph.stages.trainer import FINISHED, StageTrainer, last_checkpoint

_LOG = "log.jsonl"


class Division(NamedTuple):
    """How processes divide a step: each runs `rows` rows at once, `accumulation` times.

    Where there are more processes than micro-batches, `sharing` processes in a row hold one together.
    """

    rows: int
    accumulation: int
    sharing: int


class TrainSettings(BaseModel):
    """How long and how fast a stage trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: ClassVar[str] = "training"
    tokens: int = Field(gt=0, description="tokens to train on, in all")
    length: int = Field(gt=1, description="tokens in a row")
    batch_tokens: int = Field(gt=0, description="tokens in a step, over all devices")
    micro_batch_tokens: int | None = Field(default=None, gt=0, description="tokens at once on one device")
    retrieval_share: float = Field(default=0.0, ge=0, le=1, description="share of rows that are retrieval questions")
    isolate_documents: bool = Field(default=True, description="documents in one row do not see each other")
    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(default=1e-5, ge=0)
    warmup_steps: int = Field(default=50, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    checkpoint_steps: int = Field(default=500, gt=0, description="steps between two checkpoints")

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
        """Tokens in all steps: `tokens` less what does not fill a step."""
        return self.rows * self.length

    def division(self, processes: int) -> Division:
        """The step divided among so many processes, with the same micro-batches as in one: `micro_batch_tokens`, or
        the whole batch. Only where there are fewer of them than processes do several processes hold one together.

        Raises:
            UserError: the rows of a step do not divide.
        """
        if found := self._divided(self.batch_rows, processes):
            return found
        enough = next(rows for rows in itertools.count(self.batch_rows) if self._divided(rows, processes))
        raise UserError(
            f"{self.stage}.batch_tokens={self.batch_tokens} is {self.batch_rows} rows of {self.length:,} tokens in a "
            f"step, which {processes} processes cannot share evenly; with {enough * self.length} they can"
        )

    def _divided(self, batch_rows: int, processes: int) -> Division | None:
        most = max(1, (self.micro_batch_tokens or batch_rows * self.length) // self.length)
        batches = next(
            number for number in range(1, batch_rows + 1) if batch_rows % number == 0 and batch_rows // number <= most
        )
        pieces = math.lcm(batches, processes)
        if batch_rows % pieces:
            return None
        return Division(batch_rows // pieces, pieces // processes, pieces // batches)


def train(
    model: nn.Module,
    rows: Dataset[dict[str, Any]],
    settings: TrainSettings,
    folder: Path,
    seed: int,
    bf16: bool,
    report: Report,
    callbacks: Sequence[TrainerCallback] = (),
    clip: bool = True,
) -> None:
    """Train `model` in place, from the last whole checkpoint in `folder` on if there is one.

    `model(input_ids)` returns `{"loss": ...}`; where documents are isolated and a row has several, `starts`
    `[batch, time]` tells it the first token of each. The log is `folder/log.jsonl`, one line a step.

    Raises:
        UserError: the loss is not finite, or the processes cannot share a step evenly.
    """
    device = next(model.parameters()).device
    division = settings.division(ranks.count())
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=division.rows,
        gradient_accumulation_steps=division.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": min(settings.final_learning_rate, settings.learning_rate)},
        warmup_steps=min(settings.warmup_steps, settings.steps // 4),
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm if clip else 0.0,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=seed,
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    # One process, one device: DataParallel over all that it sees would multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    if arguments.world_size != ranks.count():
        raise ValueError(f"{ranks.count()} processes share the work and Trainer sees {arguments.world_size}")
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, settings.isolate_documents),
        callbacks=[*callbacks, _Keeper(folder, report)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = ranks.first(lambda: last_checkpoint(folder))
    if checkpoint and int(checkpoint.rsplit("-", 1)[1]) >= settings.steps:
        trainer._load_from_checkpoint(checkpoint)
        return
    trainer.train(resume_from_checkpoint=checkpoint)


def keep_activations(model: PreTrainedModel, keep: bool) -> None:
    """Keep what the backward needs of each decoder layer, or compute it again from the layer's input."""
    if keep:
        model.activation_checkpointing_disable()
    else:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def collate(batch: Sequence[dict[str, Any]], isolate: bool = True) -> dict[str, torch.Tensor]:
    """Rows as `input_ids` `[batch, time]`, and whatever arrays they have besides.

    With `starts` `[batch, time]`, True at first tokens, if documents are to be kept apart and a row has several.
    """
    ids = torch.tensor([row["input_ids"] for row in batch])
    others = batch[0].keys() - {"input_ids", "starts"}
    tensors = {"input_ids": ids, **{name: torch.from_numpy(np.stack([row[name] for row in batch])) for name in others}}
    if not isolate or all(len(row["starts"]) == 1 for row in batch):
        return tensors
    starts = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(batch):
        starts[number, row["starts"]] = True
    return {**tensors, "starts": starts}


class _Keeper(TrainerCallback):
    """Marks whole checkpoints, writes the log, shows the progress and stops at a loss that is not finite."""

    def __init__(self, folder: Path, report: Report):
        self._log, self._report = folder / _LOG, report

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not ranks.is_first():
            return
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self._log.write_text("".join(line + "\n" for line in kept))

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        ranks.wait()  # Each process writes its own random state.
        if ranks.is_first():
            (Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / FINISHED).touch()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs["grad_norm"]):
            raise UserError(
                f"the loss is {logs['loss']} at step {state.global_step}; the last good checkpoint is kept: lower "
                "learning_rate and run again"
            )
        entry = {"step": state.global_step, **{name: logs[name] for name in ("loss", "grad_norm", "learning_rate")}}
        if ranks.is_first():
            with self._log.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
        self._report(state.global_step, state.max_steps, loss=logs["loss"])
