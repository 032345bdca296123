"""Figures that other commands leave in a run's folder for its report, and to which weights they belong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmorph.convert.digests import tokenizer_digest, weights_digest
from flashmorph.convert.hub import without_revision
from flashmorph.errors import UserError
from flashmorph.files import read_json, short_names, write_json
from flashmorph.inputs.shapes import misfit
from flashmorph.plan import Plan
from flashmorph.records import Figures
from flashmorph.run.marker import MARKER, last_stages
from flashmorph.selection import BASELINE
from flashmorph.surface.outputs import claim_output, json_of, made_by

HYBRID = "hybrid"


def keep(run: Path, kind: str, found: Figures, folders: Mapping[str, Path]) -> Path:
    """Write `found` as `<kind>.json` into a run's folder.

    `found["models"]` has figures by model, `folders` where each model's weights lie. Models of the run get the names
    that results.json has for them (`teacher`, `hybrid`, `uniform`), others the end of their path.

    Raises:
        UserError: `run` is no finished run.
    """
    require_finished(run)
    labels = _labels(run, folders)
    models = {labels[name]: figures for name, figures in found["models"].items()}
    weights = {labels[name]: _judged(folder) for name, folder in folders.items()}
    path = run / f"{kind}.json"
    write_json(path, {**made_by(kind), **found, "models": models, "weights": weights})
    return path


def claim_kept(run: Path, kind: str, force: bool) -> None:
    """Refuse what `keep` would have to replace and must not.

    Raises:
        UserError: `run` is no finished run; or see `outputs.claim_output`.
    """
    require_finished(run)
    claim_output(run / f"{kind}.json", json_of(kind), force)


def kept(run: Path, kind: str, shape: Any) -> tuple[Figures | None, str]:
    """The content that `keep` wrote, of this `shape`, and a sentence if its hybrid is no longer the run's.

    None where there is nothing, or nothing that still holds.

    Raises:
        UserError: the file holds something else.
    """
    path = run / f"{kind}.json"
    if not path.is_file():
        return None, ""
    content = read_kept(path, shape, kind)
    weights = content.get("weights", {}).get(HYBRID)
    if weights and weights != _judged(run):
        return None, f"{kind}.json is about an earlier hybrid of this run and left out: run it again."
    return content, ""


def read_kept(path: Path, shape: Any, command: str) -> Figures:
    """The figures in `path`, of this `shape`.

    Raises:
        UserError: the file holds something else.
    """
    problem = misfit(content := read_json(path), shape)
    if problem:
        raise UserError(
            f"{path} does not hold what `flashmorph {command}` finds: {problem}; remove it, or run that again"
        )
    return content


def require_finished(run: Path) -> None:
    """Refuse what is no finished run.

    Raises:
        UserError: there is no such folder, or it has no results.
    """
    if not (run / MARKER).is_file():
        raise UserError(f"{run} is no run of flashmorph's: give the folder that `flashmorph morph --output` wrote")
    if not (run / "results.json").is_file():
        raise UserError(f"{run} has no results.json yet: finish it with `flashmorph morph`")


def _judged(folder: Path) -> str:
    """The identity of the model in `folder` that figures belong to: its weights and its tokens."""
    return f"{weights_digest(folder)}-{tokenizer_digest(folder)}"


def _is_teacher(plan: Plan, name: str, folder: Path) -> bool:
    """Whether a model is the one that the plan was chosen for, by whatever revision it is named."""
    pinned = plan.revision == folder.name and without_revision(name) == plan.teacher
    return name == plan.teacher or bool(plan.revision and pinned)


def _labels(run: Path, folders: Mapping[str, Path]) -> dict[str, str]:
    last, plan = last_stages(run), Plan.load(run / "plan.json")
    known = {run.resolve(): HYBRID}
    for label, name in (("transplant", "teacher"), (f"distill {BASELINE}", BASELINE), (f"extend {BASELINE}", BASELINE)):
        if label in last:
            known[(run / "stages" / last[label] / "model").resolve()] = name
    short = short_names(list(folders))
    labels: dict[str, str] = {}
    for name, folder in folders.items():
        label = "teacher" if _is_teacher(plan, name, folder) else known.get(folder.resolve(), short[name])
        labels[name] = next(each for each in (label, short[name], name) if each not in labels.values())
    return labels
