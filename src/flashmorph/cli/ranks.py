"""How a command ends that torchrun started on several ranks: they leave together, or an error ends the process at once.

torchrun ends all ranks when one has exited with an error. A rank that fails while the others are inside of a collective
must therefore exit without waiting for them, as `destroy_process_group` and NCCL's destructors do.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flashmorph.surface.interrupts import Interrupted, leave

_SECONDS = 2.0
"""Of waiting with an error that may be another rank's too; torchrun ends the other ranks within 0.1."""


def rank() -> int:
    """The rank of this process, also before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def are_several() -> bool:
    """Whether torchrun started several ranks."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def give_way(turns: int = 1) -> None:
    """Wait with an error until torchrun would have ended this process for another rank's: one error is printed once."""
    if are_several():
        time.sleep(turns * _SECONDS)


@contextmanager
def as_one_of_several() -> Iterator[None]:
    """With several ranks: leave their group after success, and after an error end this process at once.

    Another exception than an exit is printed with its traceback, unless torchrun ends this rank first: where a peer is
    gone there is an error of the connection, and only that peer's error is worth reading.
    """
    if not are_several():
        yield
        return
    try:
        yield
    except Interrupted:
        raise
    except SystemExit as stop:
        if stop.code:
            _end(stop.code if isinstance(stop.code, int) else 1)
        _leave_group()
        raise
    except BaseException as error:
        give_way(2 if rank() else 1)
        sys.excepthook(type(error), error, error.__traceback__)
        _end(1)
    else:
        _leave_group()


def _leave_group() -> None:
    from flashmorph import distributed

    distributed.leave()


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    leave(code)
