"""The identity of a run's text, which changes with the text and not with its folder."""

from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from flashmorph.data.corpus import DEMO, Corpus, Mixture, shares_of
from flashmorph.data.textfiles import TEXT, kind_of
from flashmorph.errors import UserError
from flashmorph.files import content_digest
from flashmorph.records import SettingValues

_FIRST_DOCUMENTS = 100
_DIGESTED, _LEAST_DIGESTED = 1 << 28, 1 << 20
"""Bytes that are read to know local text again: of all files together, and of each at least."""


def identity_of(corpus: Corpus | Mixture) -> list[SettingValues]:
    """The values that the text of a corpus depends on, as JSON values, part by part.

    Local text is known by what is in its files and by their names, wherever they lie; a dataset by what names it.
    """
    return [{"share": share, **_identity(part)} for part, share in shares_of(corpus)]


def has_conversations(corpus: Corpus | Mixture) -> bool:
    """Whether text is worded by the teacher's chat template: by the settings, or by the first documents of local
    files."""
    return any(part.is_chat or _is_chat_in_files(part) for part, _ in shares_of(corpus))


def _is_chat_in_files(part: Corpus) -> bool:
    try:
        return _starts_with_chat(part, str(_identity(part)))
    except UserError:
        return False  # Reading the text reports why it cannot be read.


def _identity(part: Corpus) -> dict[str, Any]:
    about: dict[str, Any] = {"source": part.source, "replies_only": part.replies_only}
    if part.source == DEMO:
        return about
    if (paths := part.paths()) is None:
        return {**about, "config": part.config, "column": part.column, "split": part.split}
    column = {} if all(kind_of(path) == TEXT for path in paths) else {"column": part.column}
    return {**about, "source": "files", "files": _contents(Path(part.source), paths), **column}


def _contents(source: Path, paths: list[Path]) -> list[tuple[str, int, str]]:
    """Name, size and digest of every file of a local source."""
    most = max(_LEAST_DIGESTED, _DIGESTED // max(1, len(paths)))
    contents = []
    for path in paths:
        stat = path.stat()
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        contents.append((name, stat.st_size, content_digest(path, stat.st_size, stat.st_mtime_ns, most)))
    return contents


@cache
def _starts_with_chat(part: Corpus, identity: str) -> bool:
    """Whether the local files with this `identity` begin with conversations."""
    if part.source == DEMO or part.paths() is None:
        return False
    return any(document.messages is not None for document in islice(part.every(), _FIRST_DOCUMENTS))
