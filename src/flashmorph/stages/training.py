"""What all training stages share: settings, `transformers.Trainer` made safe to kill, and its progress."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from flashmorph.errors import UserError
from flashmorph.files import atomic_path
from flashmorph.progress import Report
from flashmorph.stages.checkpoints import drop_damaged, finish, last_checkpoint
from flashmorph.stages.watch import Watch

_WEIGHTS = "trainable.safetensors"
_LOG = "log.jsonl"


class TrainSettings(BaseModel):
    """How long and how fast a stage trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)
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

    @property
    def accumulation(self) -> int:
        """Parts of equal size that a step is run in, so that each fits `micro_batch_tokens`."""
        micro_rows = max(1, (self.micro_batch_tokens or self.batch_tokens) // self.length)
        parts = (parts for parts in range(1, self.batch_rows + 1) if self.batch_rows % parts == 0)
        return next(number for number in parts if self.batch_rows // number <= micro_rows)


class StageTrainer(Trainer):
    """Trainer that saves what it trains, and nothing else.

    The model is a wrapper whose forward returns the loss; frozen weights and tied ones stay out of its checkpoints. A
    step whose loss or gradient is not finite never reaches the weights.
    """

    def __init__(self, *positional: Any, watch: Watch, **named: Any):
        super().__init__(*positional, **named)
        self._watch = watch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """See `Trainer`; with a look at what comes out."""
        kept = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        # Where weights are sharded, a forward needs every process.
        alone = self.accelerator.num_processes == 1
        self._watch.check_loss(loss, step, (lambda: self._forward(kept)) if alone else None)
        if self.accelerator.sync_gradients:
            self._watch.check_gradients(step)
        return loss

    def _forward(self, inputs: dict[str, Any]) -> None:
        with self.compute_loss_context_manager():
            _module(self.model)(**self._prepare_inputs(inputs))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"cannot write checkpoint-{self.state.global_step} in {self.args.output_dir}: {reason}; the checkpoint "
                "before it is kept"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable_state(_module(self.model)), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, weight in trainable_state(_module(self.model)).items():
                weight.copy_(state[name])


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `model` that train, each once."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


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
    """Train `model` in place, from the last whole checkpoint in `folder` on if there is one.

    `model(input_ids)` returns `{"loss": ...}`; where documents are isolated and a row has several, `starts`
    `[batch, time]` tells it the first token of each, and where some tokens are not learnt, `loss_mask` which are. The
    log is `folder/log.jsonl`, one line a step, and goes to each of `report_to` as well, whose files stand in `folder`.

    Raises:
        UserError: a loss or gradient is not finite, the loss has exploded, or a checkpoint cannot be written.
    """
    drop_damaged(folder)
    watch = Watch(model)
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_rows // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
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
    )
    with _reports_in(folder):
        trainer = StageTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, settings.isolate_documents),
            callbacks=[*callbacks, _Keeper(folder, report, watch)],
            watch=watch,
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(folder)
        if checkpoint and int(checkpoint.rsplit("-", 1)[1]) >= settings.steps:
            trainer._load_from_checkpoint(checkpoint)
            return
        trainer.train(resume_from_checkpoint=checkpoint)


@contextmanager
def _reports_in(folder: Path) -> Iterator[None]:
    """Trackers that Trainer reports to keep their files in `folder`; their own choice is a place outside the run."""
    places = {"TENSORBOARD_LOGGING_DIR": folder / "tensorboard", "TRACKIO_DIR": folder / "trackio", "WANDB_DIR": folder}
    before = {name: os.environ.get(name) for name in places}
    os.environ.update({name: str(place) for name, place in places.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def collate(batch: Sequence[dict[str, Any]], isolate: bool = True) -> dict[str, torch.Tensor]:
    """Rows as `input_ids` `[batch, time]`, and whatever arrays they have besides.

    With `starts` `[batch, time]`, True at first tokens, if documents are to be kept apart and a row has several; with
    `loss_mask` `[batch, time]`, False at tokens that are not learnt, if there are such.
    """
    ids = torch.tensor([row["input_ids"] for row in batch])
    others = batch[0].keys() - {"input_ids", "starts", "ignored"}
    tensors = {"input_ids": ids, **{name: torch.from_numpy(np.stack([row[name] for row in batch])) for name in others}}
    if isolate and any(len(row["starts"]) > 1 for row in batch):
        tensors["starts"] = _at(ids, [row["starts"] for row in batch])
    ignored = [row.get("ignored", ()) for row in batch]
    if any(ignored):
        tensors["loss_mask"] = ~_at(ids, ignored)
    return tensors


def _at(ids: torch.Tensor, places: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[batch, time]`, True at the places of each row."""
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(places):
        marks[number, list(row)] = True
    return marks


def _entries(log: Path) -> Iterator[dict[str, float]]:
    """The lines of a log, less one that was cut short."""
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return


class _Keeper(TrainerCallback):
    """Marks whole checkpoints, writes the log, shows the progress and stops at a loss that is not finite."""

    def __init__(self, folder: Path, report: Report, watch: Watch):
        self._log, self._report, self._watch = folder / _LOG, report, watch

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        kept = [entry for entry in _entries(self._log) if entry["step"] <= state.global_step]
        with atomic_path(self._log) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        if kept:
            self._watch.check_growth(kept[0]["loss"], 1)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
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
        with self._log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        self._report(state.global_step, state.max_steps, loss=logs["loss"])
