"""Which kernels a piece of work runs on a GPU, and which of them are a package's own."""

import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from flashmorph.bench.limit import synchronise


def kernels_of(work: Callable[[], object], device: torch.device, package: str = "fla") -> dict[str, list[str]]:
    """Names of `all` CUDA kernels that `work` runs, as the profiler sees them, and which are the Triton functions of a
    `package`: by default those of flash-linear-attention. None on other devices.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as seen:
        work()
        synchronise(device)
    ran = {event.key for event in seen.key_averages() if event.device_type.name == "CUDA"}
    return {package: sorted(ran & triton_functions(package)), "all": sorted(ran)}


def triton_functions(package: str) -> set[str]:
    """Names of the Triton functions in the modules of `package` that are loaded, their decorators taken off."""
    names = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            for value in list(vars(module).values()):
                while type(value).__module__.split(".")[0] == "triton" and hasattr(value, "fn"):
                    value = value.fn
                    names.add(getattr(value, "__name__", ""))
    return names - {""}
