"""The training loop of all training stages: settings, a `transformers.Trainer` that resumes after a kill, progress."""

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.files import atomic_path
from flashmorph.inputs.settings import FinalRate, Length, Rate, Settings, Tokens, TokensAtOnce
from flashmorph.inputs.shapes import Count, Finite, Shape, require_shape
from flashmorph.progress import Report
from flashmorph.records import SettingValues
from flashmorph.stages.checkpoints import drop_damaged, finish, last_checkpoint
from flashmorph.stages.trainer import StageTrainer
from flashmorph.stages.watch import Watch

_LOG = "log.jsonl"
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


class _Entry(Shape):
    """The fields of a line of the log that are read."""

    step: Count
    loss: Finite


class IsolatedTrainSettings(TrainSettings):
    """`TrainSettings` of a stage that may isolate the documents in one row."""

    isolate_documents: bool = Field(default=True, description="documents in one row do not see each other")

    @property
    def keeps_apart(self) -> bool:
        """See `TrainSettings`."""
        return self.isolate_documents


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
    report_to: Sequence[str] = (),
) -> None:
    """Train `model` in place, from the last complete checkpoint in `folder` on if there is one.

    The log is `folder/log.jsonl`, one line a step.

    Args:
        model: A module that returns `{"loss", "sums", "sizes"}` (`StepMean` combines micro-batches by the latter two)
            for `input_ids` `[batch, time]`. If documents are isolated and a row has several, it also gets `starts`
            `[batch, time]`, True at the first token of each; if some tokens are not targets, `loss_mask`
            `[batch, time]`, True at targets.
        rows: Rows of `settings.length` tokens; see `collate`.
        settings: Steps, batch, learning rate, clipping and checkpoint interval.
        folder: For checkpoints and the log.
        seed: Of the order of rows.
        bf16: Whether forwards run under bfloat16 autocast.
        report: Called after each step with the steps done, all steps and the loss.
        callbacks: Further callbacks of Trainer.
        clip: Whether Trainer clips the gradient of all weights together to `settings.max_grad_norm`.
        report_to: Trackers (`tensorboard`, `trackio`, `wandb`) that get the log too; their files are in `folder`.

    Raises:
        UserError: a loss or gradient is not finite, the loss has exploded, a checkpoint cannot be written, or a step
            does not divide evenly among the ranks.
    """
    distributed.first(lambda: drop_damaged(folder))
    watch = Watch(model)
    device = next(model.parameters()).device
    division = settings.division(distributed.count())
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
        report_to=list(report_to) or "none",
        project="flashmorph",
        run_name=folder.name.removesuffix(".partial"),
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    # One device per rank: DataParallel over all visible ones would multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    if arguments.world_size != distributed.count():
        raise ValueError(f"{distributed.count()} processes share the work and Trainer sees {arguments.world_size}")
    with _reports_in(folder):
        trainer = StageTrainer(
            model=model,
            args=arguments,
            watch=watch,
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, settings.keeps_apart),
            callbacks=[*callbacks, _Keeper(folder, report, watch)],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = distributed.first(lambda: last_checkpoint(folder))
        if checkpoint and int(checkpoint.rsplit("-", 1)[1]) >= settings.steps:
            trainer._load_from_checkpoint(checkpoint)
            return
        trainer.train(resume_from_checkpoint=checkpoint)


@contextmanager
def _reports_in(folder: Path) -> Iterator[None]:
    """Set the trackers' folders to `folder`: by default they write outside the run."""
    folders = {
        "TENSORBOARD_LOGGING_DIR": folder / "tensorboard",
        "TRACKIO_DIR": folder / "trackio",
        "WANDB_DIR": folder,
    }
    before = {name: os.environ.get(name) for name in folders}
    os.environ.update({name: str(path) for name, path in folders.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def keep_activations(model: PreTrainedModel, keep: bool) -> None:
    """Keep the activations of decoder layers for the backward, or recompute them from each layer's input."""
    if keep:
        model.activation_checkpointing_disable()
    else:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def collate(batch: Sequence[dict[str, Any]], isolate: bool = True) -> dict[str, torch.Tensor]:
    """Rows as `input_ids` `[batch, time]` and, stacked, their other arrays.

    With `starts` `[batch, time]`, True at first tokens, if `isolate` and a row has several documents; with `loss_mask`
    `[batch, time]`, False at tokens that are not targets, if there are any.
    """
    ids = torch.tensor([row["input_ids"] for row in batch])
    others = batch[0].keys() - {"input_ids", "starts", "ignored"}
    tensors = {"input_ids": ids, **{name: torch.from_numpy(np.stack([row[name] for row in batch])) for name in others}}
    if isolate and any(len(row["starts"]) > 1 for row in batch):
        tensors["starts"] = _mask(ids, [row["starts"] for row in batch])
    ignored = [row.get("ignored", ()) for row in batch]
    if any(ignored):
        tensors["loss_mask"] = ~_mask(ids, ignored)
    return tensors


def _mask(ids: torch.Tensor, positions: Sequence[Sequence[int]]) -> torch.Tensor:
    """A mask of the shape of `ids` `[batch, time]`, True at the `positions` of each row."""
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(positions):
        marks[number, list(row)] = True
    return marks


def logged(folder: Path) -> list[dict[str, float]]:
    """The log of `train` in `folder`, one entry a step; truncated or damaged lines are left out."""
    log = folder / _LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return [entry for line in lines if (entry := _entry(line))]


def _entry(line: str) -> dict[str, float] | None:
    try:
        entry = json.loads(line)
        require_shape(entry, _Entry, _LOG)
    except (ValueError, RecursionError):
        return None
    return entry


class _Keeper(TrainerCallback):
    """Marks complete checkpoints, writes the log, shows the progress and stops at a loss that is not finite."""

    def __init__(self, folder: Path, report: Report, watch: Watch):
        self._folder, self._log, self._report, self._watch = folder, folder / _LOG, report, watch

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        first = distributed.first(lambda: self._cut_log(state.global_step))
        if first is not None:
            self._watch.check_growth(first, 1)

    def _cut_log(self, step: int) -> float | None:
        """Remove log entries after `step`. Returns the loss of the first step, if it is logged."""
        kept = [entry for entry in logged(self._folder) if entry["step"] <= step]
        with atomic_path(self._log) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        return kept[0]["loss"] if kept else None

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.wait()  # Each rank writes its own random state.
        if distributed.is_first():
            finish(Path(args.output_dir or "") / f"checkpoint-{state.global_step}")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs["grad_norm"]):
            raise UserError(
                f"the loss is {logs['loss']} at step {state.global_step}; the last good checkpoint is kept: lower "
                "learning_rate and run again"
            )
        self._watch.check_growth(logs["loss"], state.global_step)
        entry = {"step": state.global_step, **{name: logs[name] for name in ("loss", "grad_norm", "learning_rate")}}
        if distributed.is_first():
            with self._log.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
        self._report(state.global_step, state.max_steps, loss=logs["loss"])
