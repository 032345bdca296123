"""Which implementation a linear mixer runs: the fast kernels on CUDA tensors, PyTorch's reference on all others.

transformers picks by what can be imported, when it is imported. With flash-linear-attention and Triton installed on a
machine without a GPU it picks kernels that cannot run there. So each of its kernel functions is replaced here by one
that looks at the tensor; the reference stands behind the decorated function as `__wrapped__`. Of some functions we have
a leaner reference than transformers.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashmorph.mixers.mixer import Kernels, LayerArguments

_LOG = logging.getLogger(__name__)

REFERENCE = "PyTorch reference"
_PACKED = ("cu_seqlens", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


def dispatch_by_device(kernels: Kernels) -> None:
    """Make a mixer's functions choose by the device of their first tensor."""
    module = importlib.import_module(kernels.module)
    for name in kernels.functions:
        decorated = getattr(module, name)
        if not hasattr(decorated, "dispatches_by_device"):
            setattr(module, name, _dispatching(decorated, kernels, name))


def implementation_in_use(module_name: str, function: str) -> str:
    """The module of the function that the decorated one would call on CUDA tensors."""
    decorated = getattr(importlib.import_module(module_name), function)
    return _implementation(getattr(decorated, "decorated", decorated))


def kernel_runs(kernels: Kernels, device: torch.device) -> bool:
    """Whether a mixer's tokens are mixed by a kernel on this device, in training too."""
    if device.type != "cuda" or implementation_in_use(kernels.module, kernels.functions[0]) == REFERENCE:
        return False
    return not kernels.no_gradient()


def in_one_row(function: Callable, first: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`function(first, ...)` on rows `[batch, time, ...]` put end to end: kernels take packed documents as one row."""

    def flat(value):
        aligned = isinstance(value, torch.Tensor) and value.shape[:2] == first.shape[:2]
        return value.flatten(0, 1)[None] if aligned else value

    values = {name: flat(value) for name, value in kwargs.items()}
    output, state = function(flat(first), *map(flat, args), **values)
    return output[0].unflatten(0, first.shape[:2]), state


def boundaries_in(arguments: Mapping[str, Any]) -> LayerArguments:
    """The document boundaries for a linear mixer, among the arguments of a decoder layer's attention."""
    return {name: arguments[name] for name in ("cu_seq_lens_q", "seq_idx") if name in arguments}


def _implementation(decorated: Callable) -> str:
    for cell in getattr(decorated, "__closure__", None) or ():
        if callable(cell.cell_contents) and cell.cell_contents is not decorated.__wrapped__:  # type: ignore[attr-defined]
            return cell.cell_contents.__module__
    return REFERENCE


def _dispatching(decorated: Callable, kernels: Kernels, name: str) -> Callable:
    reference = decorated.__wrapped__  # type: ignore[attr-defined]
    known = inspect.signature(reference).parameters
    apart, lean = kernels.apart.get(name), kernels.lean.get(name)
    if name in kernels.needs and implementation_in_use(kernels.module, kernels.needs[name]) == REFERENCE:
        decorated = reference
    has_kernel = _implementation(decorated) != REFERENCE

    @functools.wraps(reference)
    def choose(tensor: torch.Tensor, *args, **kwargs):
        fast = tensor.is_cuda and has_kernel
        if fast and name == kernels.functions[0] and _learns(tensor, *args, *kwargs.values()):
            if reason := kernels.no_gradient():
                _warn(f"training runs PyTorch's reference: {reason}")
                fast = False
        if any(kwargs.get(boundaries) is not None for boundaries in _PACKED) and not fast:
            if tensor.is_cuda and apart and kwargs.get("seq_idx") is not None:
                return apart(tensor, *args, **kwargs)
            raise ValueError(
                f"{reference.__name__} cannot keep packed sequences apart on {tensor.device}: split them into a batch"
            )
        if fast and kwargs.get("cu_seqlens") is not None and len(tensor) > 1:
            return in_one_row(decorated, tensor, *args, **kwargs)
        if fast:
            return decorated(tensor, *args, **kwargs)
        return (lean or reference)(tensor, *args, **{name: value for name, value in kwargs.items() if name in known})

    choose.__dict__.update(dispatches_by_device=True, decorated=decorated)
    return choose


def _learns(*values: Any) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in values)


@functools.cache
def _warn(message: str) -> None:
    """Once in a process."""
    _LOG.warning(message)
