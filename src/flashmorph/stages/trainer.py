"""`transformers.Trainer` for stages: it saves trainable weights only, unsharded or sharded over ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from flashmorph import distributed
from flashmorph.errors import OnEveryRank, UserError, first_line
from flashmorph.model.sharding import is_sharded
from flashmorph.records import Figures
from flashmorph.stages.checkpoints import SHARDS, WEIGHTS
from flashmorph.stages.step import StepMean
from flashmorph.stages.watch import Watch

_TRAINABLE = StateDictOptions(ignore_frozen_params=True)
_OF_TRAINER = (
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_defer_fsdp_gradient_reduction",
    "loss_is_scaled_for_ga",
)
"""Names of Trainer that are replaced here and not public. Were one renamed, Trainer would not call its replacement, and
checkpoints or gradients would be wrong without an error."""


class StageTrainer(Trainer):
    """A Trainer that saves trainable weights only.

    The model is a wrapper whose forward returns the loss; frozen weights and tied ones stay out of its checkpoints.
    Sharded weights (`model/sharding.py`) are saved sharded, with the optimiser's moments; any number of ranks can load
    them, also one that is not sharded. The gradient of a step is that of its mean over all micro-batches and ranks
    (`StepMean`). A step whose loss or gradient is not finite never reaches the weights.
    """

    # Trainer's flag for a loss that it must not divide by the number of micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(self, model: nn.Module, args: TrainingArguments, watch: Watch, **settings: Any):
        if missing := [name for name in _OF_TRAINER if not hasattr(Trainer, name)]:
            raise UserError(
                f"transformers {transformers.__version__} has no Trainer.{missing[0]}, which flashmorph replaces: "
                "install transformers 5.24"
            )
        super().__init__(model=model, args=args, **settings)
        if ddp := self.accelerator.ddp_handler:
            ddp.gradient_as_bucket_view = True  # Else DDP keeps a second copy of all gradients.
        self._watch, self._problem = watch, ""
        self._step = StepMean(getattr(model, "terms", None) or [[*_trainable(model).values()]])
        self._is_sharded = is_sharded(model)
        # Trainer's flag for a model that it must neither move nor wrap, which reduces its gradients. It is set after
        # Trainer's own `__init__`, which refuses such models because it cannot save their moments; `_save` here can.
        self.is_distributed_loading_by_transformers = self._is_sharded

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """See `Trainer`; the sum, which `training_step` divides at the end of the step."""
        outputs = model(**inputs)
        loss = self._step.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """See `Trainer`; the step's loss with its last micro-batch, 0 before. It checks losses and gradients."""
        kept = dict(inputs)
        part = super().training_step(model, inputs, num_items_in_batch)
        whole = self.accelerator.sync_gradients
        loss = torch.full_like(part, self._step.finish() if whole else 0.0)
        self._problem = self._problem or self._check(part, kept) or (self._check_step(loss) if whole else "")
        if whole or distributed.count() == 1:
            # A problem on one rank stops all of them, with the same message.
            if problems := [problem for problem in distributed.gather(self._problem) if problem]:
                raise OnEveryRank(problems[0])
        return loss

    def _check(self, part: torch.Tensor, inputs: dict[str, Any]) -> str:
        """The problem with a micro-batch in words, or an empty string."""
        # A forward of a sharded model needs all ranks.
        again = (lambda: self._forward(inputs)) if distributed.count() == 1 else None
        return _problem_in(lambda: self._watch.check_loss(part, self.state.global_step + 1, again))

    def _check_step(self, loss: torch.Tensor) -> str:
        """The problem with a whole step in words, or an empty string."""
        step = self.state.global_step + 1
        return _problem_in(lambda: self._watch.check_loss(loss, step, None)) or _problem_in(
            lambda: self._watch.check_gradients(step)
        )

    def _forward(self, inputs: dict[str, Any]) -> None:
        with self.compute_loss_context_manager():
            _module(self.model)(**self._prepare_inputs(inputs))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            reason = _reason_of(error)
            raise UserError(
                f"cannot write checkpoint-{self.state.global_step} in {self.args.output_dir}: {reason}; the checkpoint "
                "before it is kept"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save or self._is_sharded:
            return
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable_state(_module(self.model)), folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"weights": self._weights(), "moments": self._moments()}
        state_dict_saver.save(state, checkpoint_id=Path(output_dir) / SHARDS)
        if self.args.should_save:
            torch.save(self._schedule().state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / SHARDS).is_dir():
            weights = self._weights()
            _load_shards({"weights": weights}, folder)
            set_model_state_dict(_module(self.model), weights, options=StateDictOptions(strict=False))
            return
        if self._is_sharded:
            raise UserError(f"{folder} was written without sharding: resume with --set shard=false")
        state = load_file(folder / WEIGHTS)
        with torch.no_grad():
            for name, weight in trainable_state(_module(self.model)).items():
                weight.copy_(state[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / SHARDS).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        moments = self._moments()
        _load_shards({"moments": moments}, Path(checkpoint))
        set_optimizer_state_dict(_module(self.model), self._adam(), moments, options=_TRAINABLE)
        self._schedule().load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Gradients of sharded weights are reduced after each micro-batch, so that no device holds unsharded ones."""
        return nullcontext()

    def _weights(self) -> Figures:
        return get_model_state_dict(_module(self.model), options=_TRAINABLE)

    def _moments(self) -> Figures:
        return get_optimizer_state_dict(_module(self.model), self._adam(), options=_TRAINABLE)

    def _adam(self) -> torch.optim.Optimizer:
        """The optimiser itself: accelerate puts a wrapper around it."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        assert isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        return self.lr_scheduler


def _load_shards(state: Figures, checkpoint: Path) -> None:
    """Fill `state` from the shards of a checkpoint.

    Raises:
        UserError: they cannot be read.
    """
    try:
        state_dict_loader.load(state, checkpoint_id=checkpoint / SHARDS)
    except CheckpointException as error:
        raise UserError(f"cannot read {checkpoint / SHARDS}: {_reason_of(error)}") from error


def _reason_of(error: BaseException) -> str:
    """The first line of an error; of one that ranks had together, that of the first rank that had one."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _problem_in(check: Callable[[], None]) -> str:
    """The message of the error that `check` raises, or an empty string."""
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `model` that train, each once."""
    return {name: weight.detach() for name, weight in _trainable(model).items()}
