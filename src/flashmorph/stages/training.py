"""What all training stages share: settings, `transformers.Trainer` made safe to kill, and its progress."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from flashmorph.errors import UserError
from flashmorph.progress import Report

FINISHED = "finished"
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

    The model is a wrapper whose forward returns the loss; frozen weights and tied ones stay out of its checkpoints.
    """

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
) -> None:
    """Train `model` in place, from the last whole checkpoint in `folder` on if there is one.

    `model(input_ids)` returns `{"loss": ...}`; where documents are isolated and a row has several, `starts`
    `[batch, time]` tells it the first token of each. The log is `folder/log.jsonl`, one line a step.

    Raises:
        UserError: the loss is not finite.
    """
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
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, settings.isolate_documents),
        callbacks=[*callbacks, _Keeper(folder, report)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder)
    if checkpoint and int(checkpoint.rsplit("-", 1)[1]) >= settings.steps:
        trainer._load_from_checkpoint(checkpoint)
        return
    trainer.train(resume_from_checkpoint=checkpoint)


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


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole, or None."""
    whole = [path.parent for path in (folder / "checkpoints").glob(f"checkpoint-*/{FINISHED}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


class _Keeper(TrainerCallback):
    """Marks whole checkpoints, writes the log, shows the progress and stops at a loss that is not finite."""

    def __init__(self, folder: Path, report: Report):
        self._log, self._report = folder / _LOG, report

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self._log.write_text("".join(line + "\n" for line in kept))

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
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
        with self._log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        self._report(state.global_step, state.max_steps, loss=logs["loss"])
