"""What a search keeps on disk: losses of plans, and its own state. The first process writes, all are told the same."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashmorph import ranks
from flashmorph.errors import UserError
from flashmorph.files import read_json, write_json
from flashmorph.plan import Plan


def key_of(about: Any) -> str:
    """What the losses of a plan, or of a path of plans, are kept under."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def kept(path: Path, say: Callable[[str], None]) -> Any:
    """What an earlier search wrote; None if it is not there, or is damaged and has to be made again, which is said."""
    return ranks.first(lambda: _read(path, say))


def keep(path: Path, value: Any) -> None:
    """Write it."""
    if ranks.is_first():
        write_json(path, value)


def kept_losses(folder: Path, plans: Sequence[Plan], say: Callable[[str], None]) -> list[dict[int, float]]:
    """The losses by question that are known of each plan."""

    def read(plan: Plan) -> dict[int, float]:
        found = _read(folder / f"{key_of(plan.assignments)}.json", say)
        return {int(number): loss for number, loss in found["losses"].items()} if found else {}

    return ranks.first(lambda: [read(plan) for plan in plans])


def keep_losses(folder: Path, plan: Plan, losses: dict[int, float]) -> None:
    """Write all losses of a plan."""
    values = {str(question): losses[question] for question in sorted(losses)}
    keep(folder / f"{key_of(plan.assignments)}.json", {"assignments": plan.assignments, "losses": values})


def _read(path: Path, say: Callable[[str], None]) -> Any:
    if not path.exists():
        return None
    try:
        return read_json(path)
    except UserError as error:
        say(f"{error}; making it again")
        return None
