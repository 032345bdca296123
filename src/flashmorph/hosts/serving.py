"""What runs a host's checkpoints besides transformers: as data, for the table of hosts and for every model card."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from flashmorph.plan import FULL


@dataclass(frozen=True)
class Engine:
    """Software that runs checkpoints of one host.

    `version` is the oldest one known to; `known` says how: it was run, or its source was read. `takes` is what has to
    be done besides. Where a checkpoint must be of a kind, `needs` says it and `fits` tells it from the configuration.
    """

    name: str
    version: str
    known: str
    takes: str = ""
    needs: str = ""
    fits: Callable[[PreTrainedConfig], bool] = lambda config: True

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {name: getattr(self, name) for name in ("name", "version", "known", "takes", "needs")}


RUN = "run"
READ = "read in its source, not run"
TRANSFORMERS = Engine("transformers", "5.23", RUN)


def full_interval(options: list[str]) -> int:
    """n where every n-th layer is full and no other is; 0 where full layers stand otherwise."""
    interval = options.index(FULL) + 1 if FULL in options else 0
    if interval and all((option == FULL) == (place % interval == 0) for place, option in enumerate(options, 1)):
        return interval
    return 0
