"""Files and what identifies them: atomic writes, reading, digests and names."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError

from flashmorph.errors import UserError, quoted

_LONGEST_NAME = 20
"""Characters of a folder's name in a table."""
_TEMPORARY = re.compile(r"\.flashmorph-[0-9a-f]{32}\.part")
_LFS_POINTER = b"version https://git-lfs"
_SPECIAL = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_OF_SYSTEM = re.compile(r"\(os error (\d+)\)")
_TAKES_NO_MORE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


@contextmanager
def writing(target: Path, within: Path | None = None) -> Iterator[None]:
    """Make one sentence of the system's errors while `target` is written.

    With `within`, only of those that name a path in it, and of those of a disk that takes no more: work that writes
    also reads other files, whose errors are raised as they are.

    Raises:
        UserError: `target` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (within and error.errno not in _TAKES_NO_MORE and not _names(error, within)):
            raise
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:  # It has the number of the system's error in its words only.
        number = _OF_SYSTEM.search(str(error))
        if not number or int(number[1]) not in _TAKES_NO_MORE:
            raise
        raise UserError(f"cannot write {target}: {os.strerror(int(number[1]))}") from error


def _names(error: OSError, folder: Path) -> bool:
    """Whether an error of the system is about a path in `folder`, or about `folder` itself."""
    return isinstance(error.filename, str | bytes | os.PathLike) and Path(os.fsdecode(error.filename)).is_relative_to(
        folder
    )


@contextmanager
def atomic_path(target: Path, over_folder: bool = False) -> Iterator[Path]:
    """A temporary path (file or folder, the caller's choice) beside `target` that replaces it on success.

    An existing file is replaced, and a link, whose target stays; of folders an empty one, and any with `over_folder`.
    Errors of reading other files meanwhile are raised as they are.

    Raises:
        UserError: `target` cannot be written, is a device, a pipe or a socket, or the disk is full.
    """
    target = Path(target)
    # Without the target's name: that may be as long as the file system allows.
    temporary = target.parent / f".flashmorph-{uuid4().hex}.part"
    try:
        with writing(target):
            refuse_special(target)
            target.parent.mkdir(parents=True, exist_ok=True)
        with writing(target, within=temporary):
            yield temporary
        with writing(target):
            if over_folder and target.is_dir():
                # A folder with files in it cannot be renamed over.
                shutil.rmtree(target)
            os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()


def is_temporary(path: Path) -> bool:
    """Whether `path` has the name of what is being written, or was when its process was killed."""
    return bool(_TEMPORARY.fullmatch(path.name))


def refuse_special(path: Path) -> os.stat_result | None:
    """The status of `path`, links not followed; None if it does not exist.

    Raises:
        UserError: it is a device, a pipe or a socket.
        OSError: it cannot be looked at.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if kind := _SPECIAL.get(stat.S_IFMT(status.st_mode)):
        raise UserError(f"{path} is {kind}; give the name of a file")
    return status


def is_lfs_pointer(path: Path) -> bool:
    """Whether git-LFS has put a pointer in the place of a file's content."""
    with path.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def names_a_path(name: str) -> bool:
    """Whether a name can only be that of something here: a repository of the hub is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def read_text(path: Path, name: str = "") -> str:
    """The text in a file, which a sentence calls by its path or another `name`.

    Raises:
        UserError: the file is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name or path} is not UTF-8 text (byte {error.start:,})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def write_json(target: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, unique: bool = False) -> Any:
    """Read JSON; where keys must be `unique`, one that stands twice in an object is refused.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once if unique else None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {quoted(twice)} stands twice")
    return values


@cache
def content_digest(path: Path, size: int, changed: int, most: int) -> str:
    """Of a file of `size` bytes, last `changed` then; it is read once.

    Of a file longer than `most` bytes so many are read, in blocks at equal distances.
    """
    block = 1 << 16
    number = max(1, most // block)
    starts = range(0, size, block)
    if size > most:
        starts = [part * (size - block) // number for part in range(number + 1)]
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(block))
    return shortened(digest)


def shortened(digest: Any) -> str:
    """Twelve digits of a digest."""
    return digest.hexdigest()[:12]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of folders in a table: the shortest distinct ends of their paths, shortened at the front if long."""
    parts = {name: Path(name).parts for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        size = next((size for size in range(1, len(own)) if all(own[-size:] != other[-size:] for other in others)), 0)
        text = "/".join(own[-size:])
        found[name] = text if len(text) <= _LONGEST_NAME else "…" + text[1 - _LONGEST_NAME :]
    return found


def digest_of(value: Any) -> str:
    """The digest of a JSON value: twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def is_whole_array(path: Path, shape: tuple[int, ...] | None = None, dtype: Any = None) -> bool:
    """Whether a file holds the array that its first bytes announce, of this shape and dtype where they are given."""
    try:
        array = np.load(path, mmap_mode="r")
    except Exception:  # The header is read as Python is, and fails in as many ways.
        return False
    if not isinstance(array, np.ndarray):
        return False
    return (shape is None or array.shape == shape) and (dtype is None or array.dtype == dtype)
