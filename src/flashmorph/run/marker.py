"""The file that marks a folder as a run: the stages that its last run used, and the teacher that it belongs to."""

import logging
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

from flashmorph.errors import UserError
from flashmorph.files import read_json, write_json
from flashmorph.inputs.shapes import Shape, read_as
from flashmorph.records import Figures
from flashmorph.versions import own_version

MARKER = "flashmorph.json"
_LOG = logging.getLogger(__name__)


class Owner(Shape):
    """The teacher that a run belongs to: as it was named, and the digest of its configuration and weights."""

    name: str
    digest: str


class _Marker(Shape):
    """The stages' folders, by their labels in the last run; folders of version 0.1 do not name their teacher."""

    last: dict[str, Annotated[str, StringConstraints(pattern=r"^[a-z_]+-[0-9a-f]{12}$")]]
    teacher: Owner | None = None


def last_stages(run: Path) -> dict[str, str]:
    """The folders that the last run in `run` used, by what it called its stages.

    Raises:
        UserError: the file that marks it is missing or damaged.
    """
    return _read(run)["last"]


def owner_of(run: Path) -> Owner | None:
    """The teacher whose finished stages are in `run`; None if there are none, or it does not say whose they are."""
    try:
        marker = _read(run)
    except UserError:
        return None
    teacher = marker.get("teacher")
    return Owner(**teacher) if teacher and marker["last"] else None


def require_same_teacher(run: Path, teacher: Owner) -> None:
    """Refuse to put the stages and results of a teacher where those of another one are, which they would replace.

    The same weights under another name are the same teacher, and so is a name whose weights have changed: its stages
    run again beside the old ones.

    Raises:
        UserError: names both.
    """
    before = owner_of(run)
    if before and before.digest != teacher.digest and not same_name(before.name, teacher.name):
        raise UserError(
            f"{run} is a run of the teacher {before.name}, whose results one of {teacher.name} would replace: give "
            "another folder, or remove that one first"
        )


def about_another_teacher(run: Path, name: str) -> str:
    """A line on what `require_same_teacher` may refuse, where the weights of `name` are not read; empty otherwise."""
    before = owner_of(run)
    if not before or same_name(before.name, name):
        return ""
    return f"{run} is a run of the teacher {before.name}: it is refused for {name}, unless the weights are the same"


def same_name(one: str, other: str) -> bool:
    """Whether two names mean the same teacher: the same text, or paths to one file or folder."""
    if one == other:
        return True
    paths = Path(one), Path(other)
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def mark(run: Path) -> None:
    """Mark a folder as a run, also where its mark was damaged: only what its last run used is lost with that."""
    try:
        last_stages(run)
    except UserError as error:
        if (run / MARKER).exists():
            _LOG.warning("%s; making it again", error)
        write_json(run / MARKER, {"made_by": "flashmorph", "version": own_version(), "last": {}})


def note_teacher(run: Path, teacher: Owner) -> None:
    """Write down which teacher a marked folder belongs to."""
    marker, named = _read(run), teacher.model_dump()
    if marker.get("teacher") != named:
        write_json(run / MARKER, {**marker, "teacher": named})


def note_stage(run: Path, label: str, folder: str) -> None:
    """Write down which stage's folder the run uses for `label`."""
    marker = read_json(run / MARKER)
    marker["last"][label] = folder
    write_json(run / MARKER, marker)


def _read(run: Path) -> Figures:
    return read_as(run / MARKER, _Marker)
