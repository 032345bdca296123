"""Which files of a folder are read as text, and which are not."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from flashmorph.data.formats import is_row
from flashmorph.data.textfiles import ENDINGS, TABLE, TEXT, content_ending, json_values, kind_of, suffixes
from flashmorph.errors import UserError, cut

_NOTES = re.compile(
    r"(read[ _-]?me|licen[cs]es?|copying|copyright|notices?|notes?|change[ _-]?log|changes|contribut\w*|"
    r"code[ _-]of[ _-]conduct|citation|authors|credits|about|todo|manifest|checksums?|"
    r"(md5|sha\d+)(sums?)?|requirements|terms|data[ _-]?(sheet|card))(?![a-z])",
    re.IGNORECASE,
)
"""Names of files that describe data and are none."""
_LARGEST_METADATA_BYTES = 1 << 24
_KINDS_NAMED = 3
_ARROW = ".arrow"
"""The ending of tables that the package datasets keeps on disk."""


def data_files(source: Path, columns: Sequence[str]) -> list[Path]:
    """The files that are read of a folder, or the file itself, sorted; none where no name has one of the `ENDINGS`.

    Of a folder, names that begin with a dot are left out, and files that only describe the data: beside rows (JSON,
    parquet) notes in text, beside anything else JSON files of a single object that is no row. Tables are
    read where there is nothing else but notes, and more of them than of those.

    Raises:
        UserError: data of two kinds, or a link to nothing.
    """
    if not source.is_dir():
        return [source] if kind_of(source) else []
    named = sorted(file for file in _visible(source) if kind_of(file))
    tables = [file for file in named if kind_of(file) == TABLE]
    files = _those_there(file for file in named if kind_of(file) != TABLE)
    data = [file for file in files if not _is_metadata(file, columns)]
    if all(map(_is_note, data)) and _bytes_of(tables) > _bytes_of(data):
        return _those_there(tables)
    files = data or ([] if any(content_ending(file) == _ARROW for file in _others(source, files)) else files)
    rows = [file for file in files if kind_of(file) != TEXT]
    if rows:
        files = sorted([*rows, *_texts_beside(rows, [file for file in files if kind_of(file) == TEXT])])
    examples = {kind_of(file): file for file in reversed(files)}
    if len(examples) > 1:
        names = {kind: cut(str(file.relative_to(source))) for kind, file in sorted(examples.items())}
        about = " and ".join(f"{kind} such as {name}" for kind, name in names.items())
        raise UserError(f"{source} holds files of several kinds, {about}: give one kind")
    return files


def unread(source: Path, read: Sequence[Path]) -> str:
    """A line on the files of a folder that are no text that is read, where `read` are; nothing if there are none.

    Notes, names that begin with a dot and files that describe the data are not counted.
    """
    if not source.is_dir() or not (others := sorted(_others(source, read))):
        return ""
    number = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    tables = [ending for ending in ENDINGS if kind_of(Path(f"name{ending}")) == TABLE]
    usual = [ending for ending in ENDINGS if ending not in tables]
    return (
        f"{source}: {number} not read, {_in_words(source, others)}; text is read from {', '.join(usual)}, and from "
        f"{' or '.join(tables)} where there are none of those"
    )


def nothing_to_read(source: Path) -> UserError:
    """The error for a source of which no file is read."""
    others = sorted(_others(source, [])) if source.is_dir() else []
    there = f", only {_in_words(source, others)}" if others else ""
    arrow = any(content_ending(file) == _ARROW for file in others or [source])
    remedy = "; `to_parquet` of the package datasets writes .arrow as .parquet" if arrow else ""
    return UserError(f"{source} holds no text that is read{there}: give files that end in {', '.join(ENDINGS)}{remedy}")


def _others(source: Path, read: Iterable[Path]) -> Iterator[Path]:
    """The files of a folder that are no text that is read, nor about it."""
    read = set(read)
    for file in _visible(source):
        if kind_of(file) in (None, TABLE) and file not in read and not _is_note(file) and file.is_file():
            yield file


def _in_words(source: Path, files: Sequence[Path]) -> str:
    """Files by their endings, and one as an example."""
    counts = Counter(content_ending(file) or "without an ending" for file in files)
    kinds = [f"{number:,} {ending}" for ending, number in counts.most_common(_KINDS_NAMED)]
    if rest := len(files) - sum(number for _, number in counts.most_common(_KINDS_NAMED)):
        kinds.append(f"{rest:,} of other kinds")
    such = "such as " if len(files) > 1 else ""
    return f"{', '.join(kinds)} ({such}{cut(files[0].relative_to(source).as_posix())})"


def _visible(source: Path) -> Iterator[Path]:
    for file in source.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(source).parts):
            yield file


def _those_there(files: Iterable[Path]) -> list[Path]:
    files = list(files)
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to a file that is not there")
    return [file for file in files if file.is_file()]


def _bytes_of(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def _is_note(file: Path) -> bool:
    return bool(_NOTES.match(file.name))


def _texts_beside(rows: Sequence[Path], texts: Sequence[Path]) -> list[Path]:
    """The texts beside rows that are data of their own: not called as notes are, nor a little Markdown."""
    texts = [file for file in texts if not _is_note(file)]
    markdown = [file for file in texts if ".md" in suffixes(file)]
    if _bytes_of(markdown) < _bytes_of(rows):
        return [file for file in texts if file not in markdown]
    return texts


def _is_metadata(file: Path, columns: Sequence[str]) -> bool:
    """Whether a `.json` is a single object that is no row."""
    if ".json" not in suffixes(file) or file.stat().st_size > _LARGEST_METADATA_BYTES:
        return False
    try:
        values = list(islice(json_values(file), 2))
    except Exception:  # It is damaged: reading it reports that.
        return False
    return len(values) == 1 and isinstance(values[0], dict) and not is_row(values[0], columns)
