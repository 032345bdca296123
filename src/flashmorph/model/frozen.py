"""Weights that do not train, in the dtype of their checkpoint.

Where products run in bfloat16, autocast would make that of them anyway, beside the float32 weights. Hidden states and
norms stay in float32, so results are the same to the last bit. Experts are an exception: what multiplies them follows
the dtype of their weights, so in float32 they were not multiplied in bfloat16 at all.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_NARROW = (torch.bfloat16, torch.float16)


def frozen_dtype(config: PreTrainedConfig, bf16: bool) -> torch.dtype:
    """The dtype of frozen weights: the checkpoint's, if it has 16 bits and products run in bfloat16, else float32."""
    return config.dtype if bf16 and config.dtype in _NARROW else torch.float32


def narrow(model: PreTrainedModel, bf16: bool, trained: Collection[nn.Parameter] = ()) -> PreTrainedModel:
    """Put the matrices of `model`, other than `trained`, into their `frozen_dtype`, in place.

    It then runs under autocast alone. Its weights must come from a checkpoint of that dtype, or they are rounded.
    """
    dtype = frozen_dtype(model.config, bf16)
    if dtype != torch.float32:
        kept = set(trained)
        for weight in model.parameters():
            if weight.ndim > 1 and weight not in kept:
                weight.data = weight.data.to(dtype)
        model.get_input_embeddings().register_forward_hook(_in_float32)
    return model


def _in_float32(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
