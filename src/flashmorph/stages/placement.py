"""The device of Trainer: that of the model. By itself it takes the first GPU for a single process."""

import os
from typing import Any

import torch
from transformers import TrainingArguments

from flashmorph import distributed

_OF_ACCELERATE = "ACCELERATE_TORCH_DEVICE"


def arguments_on(device: torch.device, **values: Any) -> TrainingArguments:
    """TrainingArguments of these `values` for a model that this process has on `device`, and for no other device."""
    later = device.type == "cuda" and bool(device.index) and not distributed.are_several()
    arguments = _on_later_gpu(device, values) if later else TrainingArguments(**values)
    # One device per rank: DataParallel over all visible ones would multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _on_later_gpu(device: torch.device, values: dict[str, Any]) -> TrainingArguments:
    """accelerate takes a device from its environment; Trainer's own choice is a cached property, which is replaced."""
    before = os.environ.get(_OF_ACCELERATE)
    os.environ[_OF_ACCELERATE] = str(device)
    try:
        arguments = TrainingArguments(**values)
        first = arguments.device
    finally:
        os.environ.pop(_OF_ACCELERATE) if before is None else os.environ.update({_OF_ACCELERATE: before})
    if first != device:
        vars(arguments)["_setup_devices"] = device
        torch.cuda.set_device(device)
    return arguments
