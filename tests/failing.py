"""One rank of a command, for test_rank_errors.py: `RANKS:KIND` says which fail, and how; leaving the group blocks."""

import os
import sys
import time

import torch.distributed as dist

from flashmorph import distributed
from flashmorph.__main__ import main
from flashmorph.errors import UserError
from flashmorph.run.run import Run

RANKS, KIND = sys.argv.pop(1).split(":")


def fail(*_: object) -> None:
    """On some ranks; the others go on, into the next collective."""
    if os.environ["RANK"] in RANKS:
        raise UserError("no room here") if KIND == "user" else RuntimeError("a bug")
    distributed.wait()


def wait_for_ever(*_: object) -> None:
    """As NCCL's, where peers are inside of a collective."""
    time.sleep(3_600)


if KIND == "success":
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda: (destroy(), print(f"rank {os.environ['RANK']} left", file=sys.stderr))
else:
    dist.destroy_process_group = wait_for_ever
    if KIND == "first":
        Run.must_shard = lambda self: distributed.first(lambda: (_ for _ in ()).throw(UserError("no room here")))
    else:
        Run.must_shard = fail
main()
