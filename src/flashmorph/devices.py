"""Which device computes, and whether bfloat16 pays there."""

import torch

from flashmorph.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, available in there.items() if available))
    if name not in there:
        raise UserError(f"device {name!r} is unknown; there are auto, cpu, cuda and mps")
    if not there[name]:
        raise UserError(f"there is no {name} device here; use --device auto")
    return torch.device(name)


def use_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are fast: on GPUs that have them, and on CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False
