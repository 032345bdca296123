"""Helpers for torch.distributed under `torchrun`; no-ops with a single process.

All ranks run the same program. Work that must happen once (printing, writing, tokenising) runs on rank 0 alone, while
the other ranks wait for its result.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from flashmorph.errors import OnEveryRank, UserError

T = TypeVar("T")
P = TypeVar("P")

_PATIENCE = timedelta(days=2)
"""Timeout of collectives: rank 0 may tokenise a large corpus for hours. torchrun ends all ranks when one has exited, so
a rank with an error has to exit (`cli/ranks.py`)."""
_alone = False


def join(device: torch.device) -> torch.device:
    """Join the process group, if torchrun started several processes. Returns the device of this rank.

    Raises:
        UserError: the device type does not support several processes, one GPU is named for all of them, or a rank has
            no GPU of its own.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return device
    if device.index is not None:
        raise UserError(f"each of several processes has a GPU of its own: give --device cuda in place of {device}")
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
        # Python objects are exchanged over gloo, so that they do not synchronise the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    if dist.get_world_size() != started:
        raise ValueError(f"{started} processes were started and {dist.get_world_size()} found each other")
    return device


def leave() -> None:
    """Leave the process group, which waits for the other ranks: after success only."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """The number of ranks that share the current work: 1 inside of `first` and `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def are_several() -> bool:
    """Whether there are other ranks, also inside of `first`."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The rank of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def local_count() -> int:
    """The number of ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0, which prints and writes, or a rank inside of `alone`."""
    return _alone or rank() == 0


def wait() -> None:
    """Wait until all ranks have arrived."""
    if count() > 1:
        dist.barrier()


def first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and broadcast its result (or its UserError) to all ranks.

    Inside of `work` the helpers here behave as with a single process.

    Raises:
        UserError: `work` raised it; then every rank does.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = alone(work)
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] if is_first() else OnEveryRank(str(outcome[1]))
    return outcome[0]


def alone(work: Callable[[], T]) -> T:
    """Run `work` on this rank as if it were the only one: it writes, and waits for no other."""
    global _alone
    before, _alone = _alone, True
    try:
        return work()
    finally:
        _alone = before


def gather(value: T) -> list[T]:
    """The `value` of every rank, in the order of ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def spread(parts: Iterable[P], work: Callable[[P], T]) -> list[T]:
    """`work` of each part, in the order of `parts`: rank 0 does the first, rank 1 the second, and so on in turns.

    All ranks must call it, with the same parts; each holds the model that works. Parts are taken one by one.
    """
    size, number, done = count(), 0, []
    own = rank() if size > 1 else 0
    for number, part in enumerate(parts, 1):
        if (number - 1) % size == own:
            done.append(work(part))
    of_ranks = gather(done)
    return [of_ranks[part % size][part // size] for part in range(number)]


def total(values: torch.Tensor) -> torch.Tensor:
    """`values` of any shape, summed over all ranks with the same bits on each. For small tensors on the CPU."""
    of_ranks = gather(values)
    return torch.stack(of_ranks).sum(0) if len(of_ranks) > 1 else values


def rounds(parts: Sequence[T]) -> list[list[tuple[T, bool]]]:
    """`parts` in rounds of one part per rank, in order; each part with whether it counts.

    Every rank takes part in every round, since a sharded model runs on all ranks at once. In the last round a rank
    without a part of its own repeats the round's first part, which then does not count.
    """
    size, all_rounds = count(), []
    for start in range(0, len(parts), size):
        together = [(part, True) for part in parts[start : start + size]]
        all_rounds.append(together + [(parts[start], False)] * (size - len(together)))
    return all_rounds
