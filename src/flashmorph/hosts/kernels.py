"""Which implementation a linear mixer runs: the fast kernels on CUDA tensors, PyTorch's reference on all others.

transformers picks by what can be imported, when it is imported. With flash-linear-attention and Triton installed on a
machine without a GPU it picks kernels that cannot run there. So each of its kernel functions is replaced here by one
that looks at the tensor; the reference stands behind the decorated function as `__wrapped__`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable

import torch

_PACKED = ("cu_seqlens", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


def dispatch_by_device(module_name: str, functions: Iterable[str]) -> None:
    """Make these functions of a transformers modelling module choose by the device of their first tensor."""
    module = importlib.import_module(module_name)
    for name in functions:
        decorated = getattr(module, name)
        if not hasattr(decorated, "dispatches_by_device"):
            setattr(module, name, _dispatching(decorated))


def implementation_in_use(module_name: str, function: str) -> str:
    """What the decorated function would call on CUDA tensors: the module it comes from."""
    decorated = getattr(importlib.import_module(module_name), function)
    decorated = getattr(decorated, "decorated", decorated)
    for cell in getattr(decorated, "__closure__", None) or ():
        if callable(cell.cell_contents) and cell.cell_contents is not decorated.__wrapped__:
            return cell.cell_contents.__module__
    return "PyTorch reference"


def _dispatching(decorated: Callable) -> Callable:
    reference = decorated.__wrapped__
    known = inspect.signature(reference).parameters

    @functools.wraps(reference)
    def choose(tensor: torch.Tensor, *args, **kwargs):
        if tensor.is_cuda:
            return decorated(tensor, *args, **kwargs)
        if any(kwargs.get(name) is not None for name in _PACKED):
            raise ValueError(
                f"{reference.__name__} cannot keep packed sequences apart on {tensor.device}: split them into a batch"
            )
        return reference(tensor, *args, **{name: value for name, value in kwargs.items() if name in known})

    choose.__dict__.update(dispatches_by_device=True, decorated=decorated)
    return choose
