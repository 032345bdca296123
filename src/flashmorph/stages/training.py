"""The training loop of all training stages: settings, a `transformers.Trainer` that resumes after a kill, progress."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.files import atomic_path
from flashmorph.inputs.shapes import Count, Finite, Shape, require_shape
from flashmorph.progress import Report
from flashmorph.stages.checkpoints import drop_damaged, finish, last_checkpoint
from flashmorph.stages.placement import arguments_on
from flashmorph.stages.settings import TrainSettings
from flashmorph.stages.trainer import StageTrainer
from flashmorph.stages.watch import Watch
from flashmorph.units import byte_size

_LOG = "log.jsonl"
_LONGEST_SECONDS = 1_800
_TIMES_WRITING = 20
"""Of the time that training takes, at most so little goes into checkpoints."""
_KEPT_CHECKPOINTS = 2
_CHECKPOINT_BYTES = 12
"""Of each weight that trains: itself and two moments of Adam, in float32."""


class _Entry(Shape):
    """The fields of a line of the log that are read."""

    step: Count
    loss: Finite


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
        UserError: a loss or gradient is not finite, the loss has exploded, there is no room for checkpoints, one cannot
            be written, or a step does not divide evenly among the ranks.
    """
    distributed.first(lambda: drop_damaged(folder))
    distributed.first(lambda: _require_disk(model, settings, folder))
    watch = Watch(model)
    device = next(model.parameters()).device
    division = settings.division(distributed.count())
    arguments = arguments_on(
        device,
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
        save_total_limit=_KEPT_CHECKPOINTS,
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
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            # Under autocast accelerate makes `forward` a bound method of the model itself: a cycle, which would hold
            # the weights until garbage is collected.
            for name in ("forward", "_original_forward"):
                vars(model).pop(name, None)


def _require_disk(model: nn.Module, settings: TrainSettings, folder: Path) -> None:
    """Refuse a stage whose checkpoints will not fit on the disk: the oldest goes when the newest has been written.

    Raises:
        UserError: names both sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = min(_KEPT_CHECKPOINTS + 1, math.ceil(settings.steps / settings.checkpoint_steps))
    weights = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/**/*") if file.is_file())
    needed, free = number * _CHECKPOINT_BYTES * weights - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{settings.stage}: its checkpoints need {byte_size(needed)} more in {folder}, where {byte_size(free)} are "
            f"free: {number} of {weights:,} weights and their moments stand there at once"
        )


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
    """Marks complete checkpoints, writes the log, shows the progress and stops at a loss that is not finite.

    A checkpoint is also written where the last one is older than half an hour, so that a job with a time limit advances
    however long its steps take; or, where writing is slow, older than twenty times what the last one took.
    """

    def __init__(self, folder: Path, report: Report, watch: Watch):
        self._folder, self._log, self._report, self._watch = folder, folder / _LOG, report, watch
        self._due, self._writing_since = math.inf, 0.0

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if distributed.first(lambda: time.monotonic() >= self._due):
            control.should_save = True
        self._writing_since = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = time.monotonic() + _LONGEST_SECONDS
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
        now = time.monotonic()
        self._due = now + max(_LONGEST_SECONDS, _TIMES_WRITING * (now - self._writing_since))

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
