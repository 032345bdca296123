"""Cells: one strategy, one budget, one seed, one spend. Each is one JSON line, written as it is finished."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashmorph.errors import UserError
from flashmorph.files import atomic_path, digest_of
from flashmorph.plan import Group
from flashmorph.records import Figures, SettingValues


@dataclass(frozen=True)
class Cell:
    """The result and cost of one search.

    `spend` is the share of the strategy's own number of steps or questions; `loss` and `regret` (nats), `rank` and
    `recall` are the referee's, before any distillation. Against the best known plan there is no rank; `half_width`
    (nats) is then half of the 95 % interval of the regret. `details` has the score of each layer, and what
    `tolerance` tried; `recall` is over `recall_questions` a task.
    """

    strategy: str
    budget: str
    seed: int
    spend: float
    settings: SettingValues
    assignments: dict[Group, str]
    loss: float | None
    regret: float | None
    rank: int | None
    cost: dict[str, float]
    recall: float | None = None
    recall_questions: int = 0
    half_width: float | None = None
    details: Figures = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of the cell: its search, without the result."""
        return cell_key(self.strategy, self.budget, self.seed, self.spend, self.settings)


def cell_key(strategy: str, budget: str, seed: int, spend: float, settings: SettingValues) -> str:
    """The digest that names a cell."""
    return digest_of([strategy, budget, seed, spend, settings])


class CellFile:
    """Cells on disk. Those that were made in another `context` (teacher, branches, data) are not read, and dropped when
    the next cell is written."""

    def __init__(self, path: Path, context: str):
        self._path, self._context = path, context
        self.cells = {cell.key: cell for cell in self._read()}

    def find(self, strategy: str, budget: str, seed: int, spend: float, settings: SettingValues) -> Cell | None:
        """The finished cell, or None."""
        return self.cells.get(cell_key(strategy, budget, seed, spend, settings))

    def add(self, cell: Cell) -> None:
        """Keep one more."""
        self.cells[cell.key] = cell
        lines = [json.dumps({"context": self._context, **asdict(each)}) + "\n" for each in self.cells.values()]
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def _read(self) -> Iterator[Cell]:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if values.pop("context") == self._context:
                    yield Cell(**values)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._path}, line {number}, is no cell of `compare`: remove that line") from error
