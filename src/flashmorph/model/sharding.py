"""Models that are too large for one device, sharded over all ranks with FSDP2 (`fully_shard`).

Trainable modules are fully sharded. Of a frozen model only the decoder layers' matrices are; embedding, norms and head
are replicated. `fully_shard` is called here and Trainer is set not to wrap the model again: every device takes the same
path, and no launcher's settings can fall back to replicas.
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
from flashmorph.devices import every_core
from flashmorph.hosts.parts import decoder_of, layers_of
from flashmorph.model.layer import MorphableLayer
from flashmorph.model.morphable import Morphable

Model = TypeVar("Model", PreTrainedModel, Morphable)


def shard_student(model: PreTrainedModel, device: torch.device, bf16: bool = False) -> PreTrainedModel:
    """Shard a model that trains, one unit per decoder layer; `shard_loss` shards the rest.

    `model` may be on the CPU: its weights go to `device` unit by unit. With `bf16` layers are gathered in bfloat16, for
    forwards under autocast.
    """
    for layer in layers_of(model):
        fully_shard(layer, mesh=_mesh(device.type), mp_policy=_policy(bf16))
    return model


def shard_loss(loss: nn.Module, student: PreTrainedModel) -> None:
    """Make the module that computes the loss the root unit of a sharded student.

    Its forward then has the embedding and the head, which may be one matrix, unsharded. No-op if the student is not
    sharded.
    """
    if is_sharded(student):
        fully_shard(loss, mesh=_mesh(next(layers_of(student).parameters()).device.type))


def shard_teacher(model: PreTrainedModel, device: torch.device, bf16: bool = False) -> PreTrainedModel:
    """Shard the decoder layers of a frozen model."""
    _shard_parts(model, device, bf16)
    return model


def shard_morphable(morphable: Morphable, device: torch.device, bf16: bool = False) -> Morphable:
    """Shard the decoder layers with all their branches."""
    _shard_parts(morphable.model, device, bf16)
    return morphable


def _shard_parts(model: PreTrainedModel, device: torch.device, bf16: bool) -> None:
    """One unit per mixer and feed-forward, and a root without weights.

    Not for each layer: a branch's error and a mixer's output reach the loss without passing through the end of their
    decoder layer, so the layer's hooks would not gather the weights again for the backward. Weights outside every unit
    are frozen and need no reduction.
    """
    mesh = _mesh(device.type)
    for layer in layers_of(model):
        for part in layer.children():
            for unit in _units(part):
                trains = isinstance(part, MorphableLayer) and unit in part.trained.values()
                sharded = {weight.dtype for weight in unit.parameters() if trains or weight.ndim > 1}
                # A unit has one dtype: beside frozen matrices in bfloat16, norms in float32 are not sharded.
                apart = {weight for weight in unit.parameters() if weight.dtype not in sharded}
                if sharded:
                    fully_shard(unit, mesh=mesh, mp_policy=_policy(bf16), ignored_params=apart)
    kept = {weight for weight in model.parameters() if not isinstance(weight, DTensor)}
    fully_shard(decoder_of(model), mesh=mesh, ignored_params=kept)
    for tensor in (*kept, *model.buffers()):
        tensor.data = tensor.data.to(device)


def _units(part: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer's part that are sharded apart.

    An attention whose projections another branch borrows stays whole: a unit is gathered for its own forward only.
    """
    if not isinstance(part, MorphableLayer):
        return [part]
    borrowed = any(branch.mixer.borrows for branch in part.others.values())
    return [*part.others.values()] if borrowed else [*part.branches.values()]


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of `model` are sharded."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


@torch.no_grad()
def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` unsharded, on the CPU of rank 0; empty on the other ranks. All ranks must call it."""
    unsharded = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if distributed.is_first():
            unsharded[name] = full.detach().cpu()
    return unsharded


def in_turn(make: Callable[[], Model], device: torch.device) -> Model:
    """Run `make` on one rank of each machine after the other: until its model is sharded, a rank holds all of it.

    `device` is where `make` shards to.
    """
    if distributed.are_several():
        _mesh(
            device.type
        )  # It may take a collective of all ranks, which a rank alone in its turn would wait in for ever.
    made: list[Model] = []
    for turn in range(distributed.local_count()):
        if turn == distributed.local_rank():
            with every_core():
                made.append(make())
        distributed.wait()
    return made[0]


def _policy(bf16: bool) -> MixedPrecisionPolicy:
    """Weights are gathered in bfloat16: autocast would otherwise keep a bfloat16 copy for the backward after their unit
    has freed them. Activations are left to autocast, as without sharding."""
    dtype = torch.bfloat16 if bf16 else None
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


@cache
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))
