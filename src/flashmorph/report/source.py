"""The content of a run's folder, read once and checked against the shapes that a report needs.

What is damaged is refused, or left out with a note.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmorph.errors import UserError
from flashmorph.files import read_text
from flashmorph.inputs.readyaml import read_yaml
from flashmorph.inputs.shapes import misfit, read_as, require_shape
from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.report import shapes
from flashmorph.report.kept import kept, read_kept, require_finished
from flashmorph.run.folder import RECIPE
from flashmorph.run.marker import last_stages


@dataclass(frozen=True)
class Source:
    """A finished run. `trace` and `align` are empty, `evaluated`, `benched` and `compared` None where there are none.

    `questions` a task were asked at `length` tokens; `models` are the figures of results.json by model, `labels` what
    the run calls its stages, by digest, and `notes` what a reader must know about figures that were left out.
    """

    folder: Path
    plan: Plan
    results: Figures
    recipe: str
    questions: int
    length: int
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
        return models_in(self.results)


def models_in(results: Figures) -> dict[str, Figures]:
    """The scores in results.json, by the names of models."""
    return {name: each for name, each in results.items() if isinstance(each, dict) and "perplexity" in each}


def read_run(folder: Path) -> Source:
    """Read a run's results.

    Raises:
        UserError: it is no finished run, or a file of it is damaged.
    """
    require_finished(folder)
    plan = _plan(folder)
    results = _results(folder / "results.json")
    recipe, evaluation = _recipe(folder / RECIPE)
    evaluated, no_evaluated = kept(folder, "evaluate", shapes.Evaluate)
    benched, no_benched = kept(folder, "bench", shapes.Bench)
    trace, no_trace = _of_stage(folder, results, "select", "trace.json", list[Figures])
    align, no_align = _of_stage(folder, results, "align", "stage.json", shapes.Errors)
    if align and align.get("errors") and len(align["errors"]) % len(plan.assignments):
        align, no_align = None, "The record of align is of another number of layers and left out."
    steps = [entry for entry in trace or [] if "logits" in entry]
    if problem := misfit(steps, list[shapes.Step]) or _other_layers(steps, plan):
        trace, no_trace = None, f"trace.json of the search is damaged and left out: {problem}."
    comparison = folder / "compare" / "compare.json"
    return Source(
        folder=folder,
        plan=plan,
        results=results,
        recipe=recipe,
        questions=evaluation["questions"],
        length=evaluation["length"],
        trace=trace or [],
        align=align or {},
        labels={name.rsplit("-", 1)[1]: label for label, name in last_stages(folder).items()},
        evaluated=evaluated,
        benched=benched,
        compared=read_kept(comparison, shapes.Compare, "compare") if comparison.is_file() else None,
        notes=[note for note in (no_evaluated, no_benched, no_trace, no_align) if note],
    )


def _plan(folder: Path) -> Plan:
    """The run's plan, whose groups are its layers in turn, or all their key-value heads."""
    plan = Plan.load(folder / "plan.json")
    heads = [group.kv_head for group in plan.assignments if group.layer == 0]
    of_layer = ["" if head is None else f".kv_heads.{number}" for number, head in enumerate(heads)] or [""]
    layers = max(1, len(plan.assignments) // len(of_layer))
    groups = [f"layers.{number}{head}" for number in range(layers) for head in of_layer]
    if list(plan.assignments) != groups:
        raise UserError(f"{folder / 'plan.json'} is damaged: its groups are not {groups[0]} to {groups[-1]}")
    return plan


def _results(path: Path) -> Figures:
    """results.json; every model was asked the same tasks."""
    results = read_as(path, shapes.Results)
    models = models_in(results)
    require_shape(models, dict[str, shapes.Model], str(path))
    for name in ("teacher", "hybrid"):
        if name not in models:
            raise UserError(f"{path} is damaged: it has no figures of the {name}")
    tasks = [each["recall_by_task"].keys() for each in models.values()]
    if any(each != tasks[0] for each in tasks):
        raise UserError(f"{path} is damaged: its models were asked different tasks")
    return results


def _recipe(path: Path) -> tuple[str, dict[str, int]]:
    """The text of the recipe, and what its evaluation asked."""
    text = read_text(path)
    values = read_yaml(text, str(path))
    require_shape(values, shapes.Recipe, str(path))
    return text, values["evaluate"]


def _of_stage(folder: Path, results: Figures, stage: str, file: str, shape: Any) -> tuple[Any, str]:
    """A file of the first stage of that name behind the results, or a note where it is damaged; neither where the stage
    was never here (`--from`)."""
    digests = [each["digest"] for each in results["stages"] if each["stage"] == stage]
    path = folder / "stages" / f"{stage}-{digests[0]}" / file if digests else None
    if not path or not path.is_file():
        return None, ""
    try:
        return read_as(path, shape), ""
    except UserError as error:
        return None, f"{file} of the stage {stage} is damaged and left out: {error}."


def _other_layers(steps: list[Figures], plan: Plan) -> str:
    """Whether a search's trace is about another number of layers than its plan, in words."""
    layers = len(plan.assignments)
    return "" if all(len(entry["logits"]) == layers for entry in steps) else f"its steps are not of {layers} layers"
