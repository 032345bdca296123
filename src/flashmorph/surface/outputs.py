"""Files at paths that a user names: what is replaced, what never is, and the mark by which ours are known.

A file that carries the mark of its kind is replaced, any other one only by `--force`. Links, folders, devices, pipes
and sockets are refused, forced or not: a link is neither followed nor replaced.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmorph.errors import UserError
from flashmorph.files import atomic_path, is_temporary, refuse_special
from flashmorph.versions import own_version

_READ_BYTES = 4096
_STREAMS = ("-", "/dev/stdout", "/dev/stderr", "/dev/fd", "/proc/self/fd")


@dataclass(frozen=True)
class Mark:
    """By what a file of one kind is known as ours: how it starts, and what its first bytes contain."""

    start: bytes
    contains: bytes = b""


PAGE = Mark(b"<!doctype html>", b'<meta name="generator" content="flashmorph ')
PICTURE = Mark(b"\x89PNG\r\n\x1a\n", b"tEXtSoftware\0flashmorph ")


def signature() -> str:
    """The name of the software in the metadata of pages and pictures."""
    return f"flashmorph {own_version()}"


def made_by(command: str) -> dict[str, str]:
    """The first entry of a JSON file that a command writes."""
    return {"made_by": f"flashmorph {command}"}


def json_of(command: str) -> Mark:
    """The mark of a JSON file that starts with `made_by(command)`, as `files.write_json` writes it."""
    return Mark(f'{{\n  "made_by": "flashmorph {command}"'.encode())


def claim_output(path: Path, mark: Mark | None, force: bool) -> None:
    """Refuse a path that must not or cannot be written; to be asked before anything is spent.

    `mark` is that of what will be written; None where files of its kind carry none.

    Raises:
        UserError: the path cannot be written, with the reason; without `force` also that a file there is not ours.
    """
    if str(path) in _STREAMS or str(path.parent) in _STREAMS:
        raise UserError(f"{path} is no file; give the name of one (where a command has --json, that prints on stdout)")
    try:
        status = refuse_special(path)
        if status is None:
            _require_room(path)
            return
        if stat.S_ISLNK(status.st_mode):
            raise UserError(f"{path} is a link, which is neither followed nor replaced; give the name of a file")
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path} is a folder; give the name of a file in it or beside it")
        _require_writable(path.parent, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    if not force and not (mark and _carries(path, mark)):
        whose = "not known as flashmorph's" if mark else "already there"
        raise UserError(f"{path} is {whose}; give another file, or --force to replace it")


def claim_folder(folder: Path) -> None:
    """Refuse a path where no new folder can be put; an empty folder gives way to it.

    Raises:
        UserError: it holds anything, is a link or a mount point, or cannot be written.
    """
    try:
        if refuse_special(folder) is None:
            _require_room(folder)
            return
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, which is neither followed nor replaced; give a folder")
        if not folder.is_dir() or any(not is_temporary(path) for path in folder.iterdir()):
            raise UserError(f"{folder} already holds something; give a folder that is new or empty")
        if folder.is_mount():
            raise UserError(f"{folder} is a mount point, which cannot be replaced; give a folder in it")
        _require_writable(folder.absolute().parent, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


def save_picture(figure: Any, path: Path, **settings: Any) -> None:
    """Write a matplotlib figure as a PNG with our mark, atomically.

    Raises:
        UserError: see `files.atomic_path`.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": signature()}, **settings)


def _carries(path: Path, mark: Mark) -> bool:
    try:
        with path.open("rb") as stream:
            head = stream.read(_READ_BYTES)
    except OSError:
        return False
    return head.startswith(mark.start) and mark.contains in head


def _require_room(path: Path) -> None:
    """Whether `path` can be made where nothing stands; folders above it that are missing are made with it."""
    missing = [path.absolute()]
    while not os.path.lexists(parent := missing[-1].parent):
        missing.append(parent)
    for part in missing:
        refuse_special(parent / part.name)  # A name that is too long fails only beside an existing file.
    _require_writable(parent, path)


def _require_writable(parent: Path, path: Path) -> None:
    if not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {parent} cannot be written")
