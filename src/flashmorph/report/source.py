"""What a run's folder holds, read once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmorph.files import read_json
from flashmorph.plan import Plan
from flashmorph.report.kept import kept, require_finished
from flashmorph.runfolder import MARKER

Figures = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A finished run. `trace` and `align` are empty, `evaluated`, `benched` and `compared` None where there are none.

    `models` are the figures of results.json by model, `labels` what the run calls its stages, by digest, and `notes`
    what a reader must know about figures that were left out.
    """

    folder: Path
    plan: Plan
    results: Figures
    recipe: str
    trace: list[Figures] = field(default_factory=list)
    align: Figures = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    evaluated: Figures | None = None
    benched: Figures | None = None
    compared: Figures | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def models(self) -> dict[str, Figures]:
        """Figures by model."""
        return {name: each for name, each in self.results.items() if isinstance(each, dict) and "perplexity" in each}


def read_run(folder: Path) -> Source:
    """Read a run's results.

    Raises:
        UserError: it is no finished run, or a file of it is damaged.
    """
    require_finished(folder)
    results = read_json(folder / "results.json")
    labels = {name.rsplit("-", 1)[1]: label for label, name in read_json(folder / MARKER)["last"].items()}
    evaluated, no_evaluated = kept(folder, "evaluate")
    benched, no_benched = kept(folder, "bench")
    comparison = folder / "compare" / "compare.json"
    return Source(
        folder=folder,
        plan=Plan.load(folder / "plan.json"),
        results=results,
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        trace=_of_stage(folder, results, "select", "trace.json") or [],
        align=_of_stage(folder, results, "align", "stage.json") or {},
        labels=labels,
        evaluated=evaluated,
        benched=benched,
        compared=read_json(comparison) if comparison.is_file() else None,
        notes=[note for note in (no_evaluated, no_benched) if note],
    )


def _of_stage(folder: Path, results: Figures, stage: str, file: str) -> Any:
    """A file of the first stage of that name behind the results; None where the stage was never here (`--from`)."""
    digests = [each["digest"] for each in results["stages"] if each["stage"] == stage]
    path = folder / "stages" / f"{stage}-{digests[0]}" / file if digests else None
    return read_json(path) if path and path.is_file() else None
