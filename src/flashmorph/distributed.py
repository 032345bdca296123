"""Many processes, started by `torchrun`: what the first does while the others wait, how their figures come together.

All run the same program. What must happen once (printing, writing, tokenising) the first does alone. With one process
every function here is a formality.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from flashmorph.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(days=2)
"""How long processes wait for the first: to tokenise a large corpus takes hours. Dead ones are torchrun's business."""
_alone = False


def join(device: torch.device) -> torch.device:
    """Join the other processes, if torchrun started several; the device of this one.

    Raises:
        UserError: a device that processes cannot share a model on, or a process without a GPU of its own.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return device
    if device.type == "cuda":
        own = int(os.environ["LOCAL_RANK"])
        if own >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPUs here for {os.environ['LOCAL_WORLD_SIZE']} processes: "
                "give torchrun --nproc_per_node the number of GPUs"
            )
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes can share work on cuda and cpu, not on {device.type}")
    if not dist.is_initialized():
        # What is no tensor of the model goes through gloo, without waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    if dist.get_world_size() != started:
        raise ValueError(f"{started} processes were started and {dist.get_world_size()} found each other")
    return device


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes share the work at hand."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def are_several() -> bool:
    """Whether there are other processes, also where the first works alone."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def local_count() -> int:
    """How many processes there are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them; the others wait for it.

    Inside of `work` there is one process.

    Raises:
        UserError: `work` raised it, in all processes alike.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_first():
        global _alone
        _alone = True
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
        finally:
            _alone = False
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] if is_first() else UserError(str(outcome[1]))
    return outcome[0]


def gather(value: T) -> list[T]:
    """Each process's `value`, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, the same bits in each of them. For small tensors on the CPU."""
    found = gather(values)
    return torch.stack(found).sum(0) if len(found) > 1 else values


def rounds(parts: Sequence[T]) -> list[list[tuple[T, bool]]]:
    """`parts` in rounds of one for each process, in order.

    All processes take part in every round, since a sharded model runs in all of them at once: where parts run out, a
    process is given the round's first one again, with False: it does not count.
    """
    size, found = count(), []
    for start in range(0, len(parts), size):
        together = [(part, True) for part in parts[start : start + size]]
        found.append(together + [(parts[start], False)] * (size - len(together)))
    return found
