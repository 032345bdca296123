"""Local files of text by kind: the rows in them, one after the other."""

import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from flashmorph.data.formats import is_half, is_row, no_column
from flashmorph.data.pieces import in_pieces
from flashmorph.errors import UserError, first_line
from flashmorph.files import is_lfs_pointer

TEXT, JSON, PARQUET, TABLE = "text", "JSON", "parquet", "csv"
_KINDS = {
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".json": JSON,
    ".parquet": PARQUET,
    ".txt": TEXT,
    ".md": TEXT,
    ".csv": TABLE,
    ".tsv": TABLE,
}
ENDINGS = tuple(_KINDS)
_LONGEST_FIELD = (1 << 31) - 1
"""Characters of a field of a table; Python's own limit is 131,072."""
_DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
_ROWS_TOGETHER = 1_000
_NOT_SPACE = re.compile(r"\S")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""Halves of surrogate pairs: JSON may name one alone, which no text can hold; `?` stands for it then."""


def suffixes(path: Path) -> list[str]:
    """The endings of a name in lower case, that of a compression included."""
    return [suffix.lower() for suffix in path.suffixes]


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name, compressed or not; None for files that are not read."""
    return _KINDS.get(content_ending(path))


def content_ending(path: Path) -> str:
    """The ending that says what a file holds, compressed or not: `.csv` of `a.csv.gz`, `.gz` of `a.gz`."""
    endings = suffixes(path)
    return next((ending for ending in reversed(endings) if ending not in _DECOMPRESS), endings[-1] if endings else "")


def json_values(path: Path) -> Iterator[Any]:
    """The values in a JSON file, one after the other; of a list those in it."""
    with _open(path) as stream:
        yield from (value for _, value in _json_values(stream, path))


def stream_of(
    files: Sequence[Path], columns: tuple[str, ...], beside: tuple[str, ...] = ()
) -> datasets.IterableDataset:
    """The rows of `files`, each as `{"file": its file, "row": the columns that it has}`, with a state to resume from.

    Nothing but `columns` and `beside` is read, so the others may differ from file to file, and each file declares for
    itself what these hold. Text comes in pieces (`pieces.py`), in the first of the columns. A JSON file holds an object
    a line, one list of objects, or one object; only of lists all is in memory at a time. JSON's rows without the
    columns of a document (`formats.is_row`) are passed over.

    Raises:
        UserError: while reading, naming the file: it is damaged, not UTF-8, or has no columns of a document.
    """
    names = [str(file) for file in files]
    return datasets.IterableDataset.from_generator(
        _rows_of_files, gen_kwargs={"files": names, "columns": columns, "beside": beside}
    )


def _rows_of_files(files: Sequence[str], columns: tuple[str, ...], beside: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    readers = {TEXT: _text_rows, JSON: _json_rows, PARQUET: _parquet_rows, TABLE: _table_rows}
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
        if not is_row(present, columns):
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


def _table_rows(path: Path, columns: Sequence[str], beside: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table whose first line names its columns; a row may go over several lines, in quotes."""
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "\t" if ".tsv" in suffixes(path) else ","
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if header and not is_row(header, columns):
                raise no_column(str(path), columns[0], header)
            wanted = {name: header.index(name) for name in (*columns, *beside) if name in header}
            for row in filter(None, reader):
                if len(row) != len(header):
                    raise csv.Error(f"it has {len(row)} fields, and the first line names {len(header)} columns")
                yield {name: row[number] for name, number in wanted.items()}
        except csv.Error as error:
            raise UserError(
                f"{path}, the row that ends in line {reader.line_num}: {error}; a text with {delimiter!r}, quotes or "
                'line breaks must stand in quotes, each quote in it doubled ("")'
            ) from error


def _json_rows(path: Path, columns: Sequence[str], beside: Sequence[str]) -> Iterator[dict[str, Any]]:
    passed_over, there, some = 0, dict[str, None](), False
    with _open(path) as stream:
        for line, value in _json_values(stream, path):
            if isinstance(value, str):
                value = {columns[0]: value}
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {line}: a row must be an object, and this is {str(value)[:40]!r}")
            if is_row(value, columns):
                some = True
                yield {name: value[name] for name in (*columns, *beside) if name in value}
            elif is_half(value):
                raise no_column(f"{path}, line {line}", columns[0], list(value))
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
        if first and (text.lstrip().startswith("[") or ".json" in suffixes(path) and not _is_json(text)):
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
