"""Files of a search: losses of plans, and its own state. Rank 0 writes, all processes read the same."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import StringConstraints, model_validator

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.files import write_json
from flashmorph.inputs.shapes import Count, Finite, Shape, read_as
from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.selection.strategy import Cost


def key_of(about: Any) -> str:
    """What the losses of a plan, or of a path of plans, are kept under."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


class _Losses(Shape):
    """What is kept of a plan: by the number of a question, its loss."""

    losses: dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], Finite]


class TextLoss(Shape):
    """What is kept of a plan on text."""

    text_loss: Finite


class DistilledLosses(Shape):
    """What is kept of a plan after a short distillation; a loss a question."""

    kl: Finite
    text_loss: Finite
    losses: list[Finite]


class Effects(Shape):
    """What is kept of a counterfactual pair; no effects where it measures nothing."""

    effects: list[Finite] | None


_Numbers = Finite | list[Finite] | list[list[Finite]]
_COST = {each.name for each in fields(Cost)}


class _Moments(Shape):
    """The state of an optimiser."""

    step: Finite
    exp_avg: _Numbers
    exp_avg_sq: _Numbers


class SearchState(Shape):
    """Where a search that follows gradients has come to."""

    step: Count
    logits: _Numbers
    optimizer: _Moments
    trace: list[Figures]
    cost: dict[str, Finite]

    @model_validator(mode="after")
    def _of_one_search(self) -> "SearchState":
        if len(self.trace) != self.step or self.cost.keys() != _COST:
            raise ValueError("there must be a line a step, and what was spent")
        return self


def tensors_of(state: dict[str, Any], shape: torch.Size) -> dict[str, torch.Tensor] | None:
    """The `logits` of a state and the moments of their optimiser by name; None where they are of another shape."""
    try:
        found = {
            name: torch.tensor(value) for name, value in (state["optimizer"] | {"logits": state["logits"]}).items()
        }
    except (ValueError, TypeError, RuntimeError):  # Rows of different lengths.
        return None
    whole = found["logits"].shape == found["exp_avg"].shape == shape
    return found if whole and found["exp_avg_sq"].shape in (shape, ()) else None


def kept(path: Path, say: Callable[[str], None], shape: Any) -> Any:
    """What an earlier search wrote, of this `shape` (`read_as`); None if it is not there, or is damaged and has to be
    made again, which is said."""
    return distributed.first(lambda: _read(path, say, shape))


def kept_here(path: Path, say: Callable[[str], None], shape: Any) -> Any:
    """The same in this process alone."""
    return _read(path, say, shape)


def keep(path: Path, value: Any) -> None:
    """Write it."""
    if distributed.is_first():
        write_json(path, value)


def kept_losses(folder: Path, plans: Sequence[Plan], say: Callable[[str], None]) -> list[dict[int, float]]:
    """The losses by question that are known of each plan."""

    def read(plan: Plan) -> dict[int, float]:
        found = _read(folder / f"{key_of(plan.assignments)}.json", say, _Losses)
        return {int(number): loss for number, loss in found["losses"].items()} if found else {}

    return distributed.first(lambda: [read(plan) for plan in plans])


def keep_losses(folder: Path, plan: Plan, losses: dict[int, float]) -> None:
    """Write all losses of a plan."""
    values = {str(question): losses[question] for question in sorted(losses)}
    keep(folder / f"{key_of(plan.assignments)}.json", {"assignments": plan.assignments, "losses": values})


def _read(path: Path, say: Callable[[str], None], shape: Any) -> Any:
    if not path.exists():
        return None
    try:
        return read_as(path, shape)
    except UserError as error:
        say(f"{error}; making it again")
        return None
