"""Dropout of a teacher's configuration is off in our training: targets are a teacher's without it.

Train mode itself stays on: activation checkpointing and Mamba2's fused kernel are chosen by it.
"""

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)

_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_RATES = ("dropout", "pdrop")


def without_dropout(model: Model) -> Model:
    """`model`, its modules without dropout from here on: layers of it, and rates that modules keep as numbers
    (`attention_dropout`). Its configuration, and so what is saved, keeps the teacher's values."""
    for module in model.modules():
        if isinstance(module, _LAYERS):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in _RATES):
                setattr(module, name, 0.0)
    return model
