"""Local files of text: which files of a folder are read, and the rows in them, one after the other."""

import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from flashmorph.data.pieces import in_pieces
from flashmorph.errors import UserError, cut, first_line
from flashmorph.files import is_lfs_pointer

TEXT, JSON, PARQUET = "text", "JSON", "parquet"
_KINDS = {".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".parquet": PARQUET, ".txt": TEXT, ".md": TEXT}
ENDINGS = tuple(_KINDS)
_DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
_NOTES = re.compile(
    r"(read[ _-]?me|licen[cs]es?|copying|copyright|notices?|notes?|change[ _-]?log|changes|contribut\w*|"
    r"code[ _-]of[ _-]conduct|citation|authors|credits|about|todo|manifest|checksums?|"
    r"(md5|sha\d+)(sums?)?|requirements|terms|data[ _-]?(sheet|card))(?![a-z])",
    re.IGNORECASE,
)
"""Names of files that describe data and are none."""
_LARGEST_METADATA_BYTES = 1 << 24
_ROWS_TOGETHER = 1_000
_NOT_SPACE = re.compile(r"\S")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""Halves of surrogate pairs: JSON may name one alone, which no text can hold; `?` stands for it then."""


def data_files(source: Path, columns: Sequence[str]) -> list[Path]:
    """The files that are read of a folder, or the file itself, sorted; none where no name has one of the `ENDINGS`.

    Of a folder, names that begin with a dot are left out, and files that only describe the data: beside rows (JSON,
    parquet) notes in text, beside anything else JSON files of a single object without one of the `columns`.

    Raises:
        UserError: data of two kinds, or a link to nothing.
    """
    if not source.is_dir():
        return [source] if kind_of(source) else []
    files = sorted(file for file in source.rglob("*") if kind_of(file) and _is_visible(file.relative_to(source)))
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to a file that is not there")
    files = [file for file in files if file.is_file()]
    files = [file for file in files if not _is_metadata(file, columns)] or files
    rows = [file for file in files if kind_of(file) != TEXT]
    if rows:
        files = sorted([*rows, *_texts_beside(rows, [file for file in files if kind_of(file) == TEXT])])
    examples = {kind_of(file): file for file in reversed(files)}
    if len(examples) > 1:
        names = {kind: cut(str(file.relative_to(source))) for kind, file in sorted(examples.items())}
        about = " and ".join(f"{kind} such as {name}" for kind, name in names.items())
        raise UserError(f"{source} holds files of several kinds, {about}: give one kind")
    return files


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name, compressed or not; None for files that are not read."""
    suffixes = [suffix for suffix in _suffixes(path) if suffix not in _DECOMPRESS]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def stream_of(
    files: Sequence[Path], columns: tuple[str, ...], beside: tuple[str, ...] = ()
) -> datasets.IterableDataset:
    """The rows of `files`, each as `{"file": its file, "row": the columns that it has}`, with a state to resume from.

    Nothing but `columns` and `beside` is read, so the others may differ from file to file, and each file declares for
    itself what these hold. Text comes in pieces (`pieces.py`), in the first of the columns. A JSON file holds an object
    a line, one list of objects, or one object; only of lists all is in memory at a time. Rows in which JSON has none of
    the `columns` are passed over.

    Raises:
        UserError: while reading, naming the file: it is damaged, not UTF-8, or has none of the `columns`.
    """
    names = [str(file) for file in files]
    return datasets.IterableDataset.from_generator(
        _rows_of_files, gen_kwargs={"files": names, "columns": columns, "beside": beside}
    )


def no_column(where: str, column: str, there: Sequence[str]) -> UserError:
    """The error for rows without the wanted column."""
    names = ", ".join(map(repr, there))
    return UserError(f"{where} has no column {column!r}; it has {names}: name yours, --set data.column=NAME")


def _rows_of_files(files: Sequence[str], columns: tuple[str, ...], beside: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    readers = {TEXT: _text_rows, JSON: _json_rows, PARQUET: _parquet_rows}
    for name in files:
        path = Path(name)
        try:
            for row in readers[kind_of(path) or TEXT](path, columns, beside):
                yield {"file": name, "row": row}
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text: give it in that encoding") from error
        except Exception as error:  # Whatever a library stumbles over in a damaged file.
            raise UserError(f"{name} cannot be read: {first_line(error)}") from error


def _suffixes(path: Path) -> list[str]:
    return [suffix.lower() for suffix in path.suffixes]


def _is_visible(inside: Path) -> bool:
    return not any(part.startswith(".") for part in inside.parts)


def _texts_beside(rows: Sequence[Path], texts: Sequence[Path]) -> list[Path]:
    """The texts beside rows that are data of their own: not called as notes are, nor a little Markdown."""
    texts = [file for file in texts if not _NOTES.match(file.name)]
    markdown = [file for file in texts if ".md" in _suffixes(file)]
    if sum(file.stat().st_size for file in markdown) < sum(file.stat().st_size for file in rows):
        return [file for file in texts if file not in markdown]
    return texts


def _is_metadata(file: Path, columns: Sequence[str]) -> bool:
    """Whether a `.json` is a single object that is no row."""
    if ".json" not in _suffixes(file) or file.stat().st_size > _LARGEST_METADATA_BYTES:
        return False
    try:
        with _open(file) as stream:
            values = list(islice(_json_values(stream, file), 2))
    except Exception:  # It is damaged: reading it reports that.
        return False
    if len(values) != 1 or not isinstance(values[0][1], dict):
        return False
    return not any(name in values[0][1] for name in columns)


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a pointer of git-LFS and not the file: fetch it with `git lfs pull`")
    decompress = _DECOMPRESS.get(path.suffix.lower())
    return decompress(path) if decompress else path.open("rb")


def _text_rows(path: Path, columns: Sequence[str], beside: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for piece in in_pieces(text):
            yield {columns[0]: piece}


def _parquet_rows(path: Path, columns: Sequence[str], beside: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _open(path) as stream, pq.ParquetFile(_seekable(stream, path)) as file:
        present = file.schema_arrow.names
        if not any(name in present for name in columns):
            raise no_column(str(path), columns[0], present)
        wanted = [name for name in (*columns, *beside) if name in present]
        for batch in file.iter_batches(batch_size=_ROWS_TOGETHER, columns=wanted, use_threads=False):
            yield from batch.to_pylist(maps_as_pydicts="lossy")


def parquet_rows(path: Path) -> int:
    """The number of rows of a parquet file, compressed as a whole or not."""
    with _open(path) as stream, pq.ParquetFile(_seekable(stream, path)) as file:
        return file.metadata.num_rows


def _seekable(stream: BinaryIO, path: Path) -> BinaryIO:
    return io.BytesIO(stream.read()) if path.suffix.lower() in _DECOMPRESS else stream


def _json_rows(path: Path, columns: Sequence[str], beside: Sequence[str]) -> Iterator[dict[str, Any]]:
    passed_over, there, some = 0, dict[str, None](), False
    with _open(path) as stream:
        for line, value in _json_values(stream, path):
            if isinstance(value, str):
                value = {columns[0]: value}
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {line}: a row must be an object, and this is {str(value)[:40]!r}")
            if any(name in value for name in columns):
                some = True
                yield {name: value[name] for name in (*columns, *beside) if name in value}
            elif not some:
                there.update(dict.fromkeys(value))
                passed_over += 1
                if passed_over == _ROWS_TOGETHER:
                    break
    if passed_over and not some:
        raise no_column(str(path), columns[0], list(there))


def _json_values(stream: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """The values in a JSON file, each with the number of its line; of a list those in it."""
    first = True
    for number, line in enumerate(stream, 1):
        text = _decoded(line, path, number)
        if not text.strip():
            continue
        if first and (text.lstrip().startswith("[") or ".json" in _suffixes(path) and not _is_json(text)):
            yield from _values(text + _decoded(stream.read(), path, number + 1), path, number)
            return
        first = False
        yield from _values(text.strip(), path, number)


def _values(text: str, path: Path, number: int) -> Iterator[tuple[int, Any]]:
    """The values in a text that begins in line `number`, one after the other; of a list those in it."""
    end = 0
    while match := _NOT_SPACE.search(text, end):
        value, end = _parsed(text, match.start(), path, number)
        yield from ((number, each) for each in (value if isinstance(value, list) else [value]))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _decoded(data: bytes, path: Path, number: int) -> str:
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}: this is not UTF-8 text: give the file in that encoding") from error


def _parsed(text: str, start: int, path: Path, number: int) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number + error.lineno - 1}: this is not valid JSON: {error.msg}") from error
    if _HALF_PAIR.search(text, start, end):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return value, end
