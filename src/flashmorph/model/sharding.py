"""Models that are too large for one device: their weights divided among all processes by FSDP2 (`fully_shard`).

What trains is divided whole. Of what is frozen the matrices of the decoder layers are; the rest (embedding, norms,
head) stays on every device. `fully_shard` is called here and Trainer is told so: there is one path on every device, and
no launcher's settings that could fall back to whole copies.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flashmorph import distributed
from flashmorph.model.morphable import Morphable, MorphableLayer

Model = TypeVar("Model", PreTrainedModel, Morphable)


def shard_student(model: PreTrainedModel, device: torch.device, bf16: bool = False) -> PreTrainedModel:
    """Divide a model that trains, a decoder layer a unit; `shard_loss` takes the rest.

    `model` may be on the CPU: its weights go to `device` unit by unit. With `bf16` layers are gathered in bfloat16, for
    forwards under autocast.
    """
    for layer in model.model.layers:
        fully_shard(layer, mesh=_mesh(device.type), mp_policy=_policy(bf16))
    return model


def shard_loss(loss: nn.Module, student: PreTrainedModel) -> None:
    """Make the module that computes the loss the root of a divided student, so that embedding and head, which may be
    one matrix, are whole wherever its forward needs them. Nothing where the student is whole."""
    if is_sharded(student):
        fully_shard(loss, mesh=_mesh(next(student.model.layers.parameters()).device.type))


def shard_teacher(model: PreTrainedModel, device: torch.device, bf16: bool = False) -> PreTrainedModel:
    """Divide the decoder layers of a model that does not train."""
    _shard_parts(model, device, bf16)
    return model


def shard_morphable(morphable: Morphable, device: torch.device, bf16: bool = False) -> Morphable:
    """Divide the decoder layers with all their branches."""
    _shard_parts(morphable.model, device, bf16)
    return morphable


def _shard_parts(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """A unit for each mixer and feed-forward, and a root without weights.

    Not for each layer: a branch's error and a mixer's output reach the loss without passing through the end of their
    decoder layer, so the layer's hooks would not have the weights back for the backward. What no unit holds is frozen,
    and needs no reduction.
    """
    mesh = _mesh(device.type)
    for layer in model.model.layers:
        for part in layer.children():
            for unit in part.branches.values() if isinstance(part, MorphableLayer) else (part,):
                if any(weight.ndim > 1 for weight in unit.parameters()):
                    fully_shard(unit, mesh=mesh, mp_policy=_policy(bf16))
    kept = {weight for weight in model.parameters() if not isinstance(weight, DTensor)}
    fully_shard(model.model, mesh=mesh, ignored_params=kept)
    for tensor in (*kept, *model.buffers()):
        tensor.data = tensor.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of `model` are divided."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


@torch.no_grad()
def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` on the CPU with its divided tensors put together, in the first process; empty in the others.

    To be called by all at once.
    """
    found = {}
    for name, tensor in state.items():
        together = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if distributed.is_first():
            found[name] = together.detach().cpu()
    return found


def in_turn(make: Callable[[], Model]) -> Model:
    """What `make` returns, made by one process of a machine after the other: each holds a whole model until then."""
    made: list[Model] = []
    for turn in range(distributed.local_count()):
        if turn == distributed.local_rank():
            made.append(make())
        distributed.wait()
    return made[0]


def _policy(bf16: bool) -> MixedPrecisionPolicy:
    """Weights are gathered in bfloat16, which autocast would otherwise copy them to and keep for the backward after
    their unit has given them back. Activations are autocast's business, as without units."""
    dtype = torch.bfloat16 if bf16 else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


@cache
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))
