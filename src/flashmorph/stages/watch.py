"""Stop training on non-finite losses or gradients before the optimiser step, naming the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flashmorph.errors import UserError
from flashmorph.hosts.parts import LAYER

_OUTSIDE = "the embedding, the head or the last norm"
_EXPLODED = 10.0
_ADVICE = "the last good checkpoint is kept: lower learning_rate and run again"


class Watch:
    """Checks the loss and the gradients of a model, step by step."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._weights: dict[str, list[nn.Parameter]] = {}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                match = LAYER.match(name)
                self._weights.setdefault(f"layer {match[1]}" if match else _OUTSIDE, []).append(weight)
        self._norms: dict[str, torch.Tensor] = {}
        self._first: float | None = None

    def check_loss(self, loss: torch.Tensor, step: int, run: Callable[[], Any] | None) -> None:
        """Check the loss of a micro-batch; `run` repeats its forward, to find the layer.

        Raises:
            UserError: it is not finite.
        """
        if not torch.isfinite(loss).all():
            where = f", {self._first_broken(run)}" if run else ""
            raise UserError(f"the loss is {loss.item()} at step {step}{where}; {_ADVICE}")

    def check_gradients(self, step: int) -> None:
        """Check the gradients of a step, before they are clipped.

        Raises:
            UserError: one is not finite.
        """
        gradients = {
            part: [_local(weight.grad) for weight in weights if weight.grad is not None]
            for part, weights in self._weights.items()
        }
        self._norms = {part: nn.utils.get_total_norm(each) for part, each in gradients.items() if each}
        if self._norms and not torch.isfinite(torch.stack(list(self._norms.values()))).all():
            broken = [part for part, norm in self._norms.items() if not torch.isfinite(norm)]
            layers = [part for part in broken if part != _OUTSIDE]
            where = (
                f"layers {layers[0].split()[1]} to {layers[-1].split()[1]}"
                if len(layers) > 1
                else (layers or broken)[0]
            )
            raise UserError(f"the gradient is not finite at step {step}, in {where}; {_ADVICE}")

    def check_growth(self, loss: float, step: int) -> None:
        """Check the loss of a whole step against that of the first.

        Raises:
            UserError: it has exploded.
        """
        if self._first is None:
            self._first = loss
        if loss > _EXPLODED * max(self._first, 1.0):
            most = max(self._norms, key=lambda part: float(self._norms[part]), default=None)
            where = "" if most is None else f", the largest gradient in {most}"
            raise UserError(
                f"the loss has exploded: {loss:.4g} at step {step}, {self._first:.4g} at the first{where}; {_ADVICE}"
            )

    @torch.no_grad()
    def _first_broken(self, run: Callable[[], Any]) -> str:
        """The first layer with a module whose output is not finite, in words."""
        broken: list[str] = []

        def check(layer: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                if not broken and not all(torch.isfinite(each).all() for each in outputs if torch.is_tensor(each)):
                    broken.append(layer)

            return hook

        named = [(LAYER.match(name), module) for name, module in self._model.named_modules()]
        hooks = [module.register_forward_hook(check(layer[1])) for layer, module in named if layer]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return f"first in layer {broken[0]}" if broken else "in no decoder layer: look at the teacher and the head"


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a gradient; the gradient itself if it is not sharded."""
    part: Any = getattr(gradient, "to_local", None)
    return part() if part else gradient
