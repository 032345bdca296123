"""The most memory that a piece of work takes beyond what was taken before it."""

from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak less bytes before: allocated tensors on CUDA, resident memory of the process on Linux.

    None elsewhere. Resident memory also has what the allocator keeps, so small figures are rough.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        work()
        return None
    try:
        _CLEAR.write_text(_RESET_PEAK)
        before = _resident("VmRSS")
    except OSError:
        work()
        return None
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
