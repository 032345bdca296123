"""The state of a search that follows gradients, on disk: an interrupted search goes on where it stopped."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from flashmorph.records import Figures
from flashmorph.selection.cache import SearchState, keep, kept, tensors_of
from flashmorph.selection.strategy import Cost

_EVERY = 10
_FILE = "search_state.json"
_LOG = logging.getLogger(__name__)


class StateOnDisk:
    """Keeps the state every few steps, atomically, in a file of `folder`; `say` is called where it is damaged."""

    def __init__(self, folder: Path, say: Callable[[str], None] = _LOG.warning):
        self._path, self._say = folder / _FILE, say

    def restore(
        self, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[Figures]
    ) -> tuple[int, Cost] | None:
        """Fill in the state that was kept; see `State`."""
        state = kept(self._path, self._say, SearchState)
        if state is None:
            return None
        if (found := tensors_of(state, logits.shape)) is None:
            self._say(f"{self._path} is damaged: it is of another search; making it again")
            return None
        with torch.no_grad():
            logits.copy_(found.pop("logits"))
        optimizer.state[logits] = found
        trace[:] = state["trace"]
        return state["step"], Cost(**state["cost"])

    def keep(
        self, step: int, logits: torch.Tensor, optimizer: torch.optim.Optimizer, trace: list[Figures], cost: Cost
    ) -> None:
        """Write the state, every few steps."""
        if step % _EVERY == 0:
            moments = {name: value.tolist() for name, value in optimizer.state[logits].items()}
            state = {"step": step, "logits": logits.tolist(), "optimizer": moments, "trace": trace}
            keep(self._path, {**state, "cost": cost.to_dict()})
