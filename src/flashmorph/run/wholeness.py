"""Whether what a stage left in its folder is still there and whole."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flashmorph.convert.checkpoint import travelling_files
from flashmorph.errors import quoted
from flashmorph.inputs.shapes import Finite, Shape, misfit
from flashmorph.records import Figures

CHECKPOINTS = "checkpoints"
_SMALL_BYTES = 1 << 20
_NOT_KEPT = ("stage.json", "spent.json")

Listing = dict[str, dict[str, Any]]


class _Record(Shape):
    """The fields of every stage's record that are read."""

    stage: str
    digest: str
    seconds: Finite
    tokens: Finite | None = None
    summary: str = ""
    notices: list[str] = []
    left_out: list[str] = []
    errors: list[float] = []
    files: dict[str, dict[str, Annotated[int, Field(ge=0)] | str]]


def listing(folder: Path) -> Listing:
    """Every file in `folder` with its size in bytes, and the digest of one below a MiB; each is on the disk then.

    Checkpoints of training are left out, which go when the stage is finished, and what travels with a model's weights,
    which may be renewed.
    """
    files: Listing = {}
    renewed = set(travelling_files(folder / "model"))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if name.parts[0] == CHECKPOINTS or str(name) in _NOT_KEPT or path in renewed:
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[name.as_posix()] = _looks(path)
    return files


def damage(folder: Path, record: Any, digest: str | None = None) -> str:
    """The damage of a finished stage in words, from its stage.json; empty if it is complete.

    `digest` is the stage's, where that is known.
    """
    if problem := misfit(record, _Record):
        return f"stage.json: {problem}"
    if digest and record["digest"] != digest:
        return f"stage.json is of the stage {quoted(record['digest'])}"
    differences = (_difference(folder / name, name, kept) for name, kept in record["files"].items())
    return next(filter(None, differences), "")


def _difference(path: Path, name: str, kept: dict[str, Any]) -> str:
    """The change of a file since it was recorded, in words; empty if there is none."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:  # A name that no file can have.
        size = None
    if size is None:
        return f"{quoted(name)[1:-1]} is not there"
    if size != kept.get("bytes"):
        return f"{name} has {size:,} bytes, and had {kept.get('bytes')}"
    return f"{name} has another content than it had" if "sha256" in kept and _looks(path) != kept else ""


def _looks(path: Path) -> Figures:
    size = path.stat().st_size
    if size >= _SMALL_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
