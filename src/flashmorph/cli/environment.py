"""Versions, devices and kernels, for `flashmorph env` and bug reports."""

import platform

import torch

from flashmorph.data.isolation import how_apart
from flashmorph.devices import device_name, pick_device, use_bf16
from flashmorph.hosts import HOSTS, OWN, supports_varlen, use_kernels
from flashmorph.mixers.kernels import REFERENCE, implementation_in_use
from flashmorph.mixers.mixer import Kernels
from flashmorph.versions import own_version, version_of

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "flash-linear-attention",
    "mamba-ssm",
    "causal-conv1d",
    "triton",
)


def describe() -> dict[str, str]:
    """Facts by name; a kernel's line has what runs on this device, and why."""
    device = pick_device("auto")
    facts = {"flashmorph": own_version(), "python": platform.python_version()}
    facts |= {name: version_of(name) for name in _PACKAGES}
    facts["device"] = device_name(device)
    facts["cpu threads"] = str(torch.get_num_threads())
    facts["bfloat16 products"] = "used" if use_bf16(device) else "not used (slow or missing on this device)"
    for host in HOSTS:
        use_kernels(host.model_type)
        for kernels in (mixer.kernels for mixer in host.mixers.values() if mixer.kernels):
            facts |= {name: _kernel(kernels, name, device) for name in kernels.functions}
    facts[OWN.name] = "linear heads: PyTorch's operations on every device, no kernel"
    for host in (*HOSTS, OWN):
        facts[f"{host.name} rows"] = f"packed documents {how_apart(True, supports_varlen(host, device))}"
    return facts


def _kernel(kernels: Kernels, name: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"PyTorch reference (tensors are on {device.type}; the fast kernels need CUDA)"
    used = implementation_in_use(kernels.module, name)
    if used == REFERENCE:
        return "PyTorch reference (no kernel package; see the extra `gpu`)"
    reason = kernels.no_gradient() if name == kernels.functions[0] else ""
    return f"{used}; in training PyTorch reference ({reason})" if reason else used
