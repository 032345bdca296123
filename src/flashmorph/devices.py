"""Which device computes, whether bfloat16 pays there, and how much memory a process may take of it."""

import ctypes
import gc
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from flashmorph.errors import UserError

_SHARE = {"cuda": 0.8, "mps": 0.7, "cpu": 0.5}
"""Of a device's memory, what formulas may fill: the rest is for their error, for what the device itself takes, and on a
CPU for other programs."""
_NUMBER = re.compile("[0-9]{1,3}")
_CPU = Path("/proc/cpuinfo")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; `cuda:1` takes the second GPU, and makes it this process's own.

    Kernels in Triton run on the current device, not on that of their tensors, so the GPU becomes the current one.

    Raises:
        UserError: the device asked for is not there.
    """
    usable_types = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, available in usable_types.items() if available))
    kind, separator, number = name.partition(":")
    if kind not in usable_types or separator and not (kind == "cuda" and _NUMBER.fullmatch(number)):
        raise UserError(
            f"device {name!r} is unknown; there are auto, cpu, cuda, cuda:N (the GPU of that number) and mps"
        )
    if not usable_types[kind]:
        raise UserError(f"there is no {kind} device here; use --device auto")
    if not separator:
        return torch.device(kind)
    if int(number) >= (count := torch.cuda.device_count()):
        those = "is cuda:0 only" if count == 1 else f"are cuda:0 to cuda:{count - 1}"
        raise UserError(f"there is no device {name} here; there {those}")
    device = torch.device(kind, int(number))
    torch.cuda.set_device(device)
    return device


def dtype_name(dtype: torch.dtype | str | None) -> str:
    """`bfloat16`, as config.json and recipes have it."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The name of a GPU of CUDA's, the kind and model of a CPU, the kind of any other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = _cpu_model(_CPU) if device.type == "cpu" else ""
    return f"{device.type}, {model}" if model else device.type


def _cpu_model(path: Path) -> str:
    """As Linux has it, else as Python does; `` where neither knows."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def limit_threads() -> None:
    """Let PyTorch use no more threads than there are cores for this process.

    It counts the cores of the machine; a container may have fewer, and threads that wait for each other are many times
    slower than as many threads as cores. Fewer threads, by `OMP_NUM_THREADS`, stay fewer.
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), _own_cores(), _cgroup_cores(_CGROUPS, _OWN_CGROUPS))))


@contextmanager
def every_core() -> Iterator[None]:
    """Within this, PyTorch uses all cores that are there for this process: for work that other ranks wait for.

    torchrun starts every process with a single thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, min(_own_cores(), _cgroup_cores(_CGROUPS, _OWN_CGROUPS))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _own_cores() -> int:
    """Cores that this process may run on; not every system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroup_cores(root: Path, own: Path) -> int:
    """Cores whose time the control groups (version 2) of this process allow, rounded up."""
    cores = os.cpu_count() or 1
    for limit in _limits(root, own, {"": "cpu.max"}):
        quota, _, period = limit.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def with_float64(device: torch.device) -> torch.device:
    """This device, or the CPU in place of an Apple chip's, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def use_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are fast: on GPUs that have them, and on CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def usable_memory(device: torch.device, processes: int = 1) -> float:
    """Bytes that each of `processes` ranks on this machine may use.

    Each has a GPU of its own; they share the memory of a CPU.
    """
    return usable(total_memory(device), device.type) / (processes if device.type == "cpu" else 1)


def usable(total: float, kind: str = "cuda") -> float:
    """Bytes to plan with on a device of this kind that has `total` bytes."""
    return total * _SHARE[kind]


def release_memory(device: torch.device) -> None:
    """Free what earlier work left to Python's garbage collector, and what PyTorch or the C library keep of it.

    glibc gives little back by itself (docs/decisions/0036).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # Other C libraries have no such function.
            ctypes.CDLL(None).malloc_trim(0)


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has, used or not: on a CPU what the process's control group may take."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([_physical_memory(), *_cgroup_limits(_CGROUPS, _OWN_CGROUPS)])


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits(root: Path, own: Path) -> Iterator[int]:
    """Limits of memory, in bytes."""
    for value in _limits(root, own, {"": "memory.max", "memory": "memory.limit_in_bytes"}):
        if value.isdecimal():
            yield int(value)


def _limits(root: Path, own: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Limits of the control groups (version 2 and 1) that this process is in, and of those above them.

    `files` have the name of the limit by the controller of version 1; that of version 2 is under ``.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        controller = next((name for name in controllers.split(",") if name in files), None)
        if controller is None:
            continue
        top = root / controller
        group = top / path.lstrip("/")
        # Inside of a container the path is the host's, and its own group stands at the top.
        for folder in [group, *group.parents]:
            limit = folder / files[controller]
            if folder.is_relative_to(top) and limit.is_file():
                yield limit.read_text().strip()
