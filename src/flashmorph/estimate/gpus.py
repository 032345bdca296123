"""What GPUs can do, from their makers' data sheets."""

from typing import NamedTuple

from flashmorph.errors import UserError, unknown


class Gpu(NamedTuple):
    """`memory_bytes`, and per second the bfloat16 operations of dense matrix products and the bytes read from memory.

    Sheets that give operations with sparsity are halved. A sheet's GB is taken as 10^9 bytes.
    """

    name: str
    memory_bytes: float
    flops: float
    bandwidth: float


def _gpu(name: str, gigabytes: float, teraflops: float, gigabytes_per_second: float) -> Gpu:
    return Gpu(name, gigabytes * 1e9, teraflops * 1e12, gigabytes_per_second * 1e9)


GPUS = {
    "a10": _gpu("NVIDIA A10", 24, 125, 600),
    "a100-40gb": _gpu("NVIDIA A100 SXM 40GB", 40, 312, 1555),
    "a100": _gpu("NVIDIA A100 SXM 80GB", 80, 312, 2039),
    "l4": _gpu("NVIDIA L4", 24, 121, 300),
    "l40s": _gpu("NVIDIA L40S", 48, 362, 864),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 24, 71, 936),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 24, 165.2, 1008),
    "h100": _gpu("NVIDIA H100 SXM", 80, 989, 3350),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 80, 756, 2000),
    "h200": _gpu("NVIDIA H200 SXM", 141, 989, 4800),
    "b200": _gpu("NVIDIA B200 (HGX)", 180, 2250, 8000),
    "mi300x": _gpu("AMD Instinct MI300X", 192, 1307.4, 5300),
    "mi325x": _gpu("AMD Instinct MI325X", 256, 1307.4, 6000),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in any case.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    if name.lower() not in GPUS:
        raise UserError(unknown("GPU", name, GPUS))
    return GPUS[name.lower()]
