"""Folders as they are found: what is read of them, what is left out, and what is said of files that cannot be read."""

import csv
import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_corpus import TEXTS, read_all, write_jsonl

import flashmorph.data.corpus
from flashmorph.data.corpus import Corpus, Mixture, Position, files_of, unread_of
from flashmorph.errors import UserError
from flashmorph.tasks import SPLITS

ROWS = [{"text": text} for text in TEXTS[:20]]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows in the form that the file's name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def sizes(source: Path, column: str = "text") -> set[str]:
    """The names of the files that stand in the digest of a source."""
    return {path.name for path in files_of(Corpus(str(source), column=column))}


def test_names_that_begin_with_a_dot_are_left_out(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "._train.jsonl").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    for folder in (".ipynb_checkpoints", "deep/.cache"):
        write_rows(tmp_path / folder / "train-checkpoint.jsonl", [{"text": "an old copy"}])
    assert read_all(tmp_path) == sorted(TEXTS[:20])
    assert sizes(tmp_path) == {"train.jsonl"}


@pytest.mark.parametrize("name", [".hidden.jsonl", ".hidden/data.jsonl"])
def test_what_is_asked_for_by_name_may_begin_with_a_dot(tmp_path, name):
    write_rows(tmp_path / name, ROWS)
    for source in (tmp_path / name, tmp_path / Path(name).parts[0]):
        assert read_all(source) == sorted(TEXTS[:20])


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_other_columns_may_differ_from_file_to_file(tmp_path, ending):
    others = [{"id": 1, "meta": {"a": 1}}, {"id": "one", "meta": "none"}, {}, {"id": [1.5], "date": True}]
    for number, other in enumerate(others):
        rows = [{**other, "text": text} for text in TEXTS[number * 5 : number * 5 + 5]]
        write_rows(tmp_path / f"{number}.{ending}", rows)
    assert read_all(tmp_path) == sorted(TEXTS[:20])


def test_other_columns_may_differ_from_row_to_row(tmp_path):
    kinds = [1, "one", None, [1], {"a": [{}]}]
    rows = [{"text": text, "other": kinds[number % 5]} for number, text in enumerate(TEXTS[:20])]
    assert read_all(write_rows(tmp_path / "data.jsonl", rows)) == sorted(TEXTS[:20])


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_column_may_be_null_at_times(tmp_path, ending):
    rows = [{"text": text, "n": 1} if number % 3 else {"text": None, "n": 1} for number, text in enumerate(TEXTS[:20])]
    write_rows(tmp_path / f"data.{ending}", rows)
    expected = sorted(row["text"] for row in rows if row["text"])
    assert read_all(tmp_path) == expected
    if ending != "parquet":
        write_rows(tmp_path / f"data.{ending}", [{k: v for k, v in row.items() if v is not None} for row in rows])
        assert read_all(tmp_path) == expected


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_the_file_without_the_column_is_named(tmp_path, ending):
    write_rows(tmp_path / f"good.{ending}", ROWS)
    write_rows(tmp_path / f"odd.{ending}", [{"content": "a", "n": 1}, {"content": "b", "n": 1}])
    with pytest.raises(UserError, match=rf"odd\.{ending} has no column 'text'; it has 'content', 'n'"):
        read_all(tmp_path)


NOTES = {
    "README.md": "About the data.",
    "readme_de.txt": "Über die Daten.",
    "LICENSE.txt": "Do what you like. " * 900,
    "CHANGELOG.md": "- more rows",
    "docs/methods.md": "How it was made.",
    "notes.txt": "To do.",
    "SHA256SUMS.txt": "0 data",
    "dataset_infos.json": json.dumps({"default": {"splits": ["train"]}}, indent=2),
    "meta.json": '{"rows": 9}',
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_what_tells_of_the_data_does_not_stop_it(tmp_path, ending):
    for part in ("train", "test"):
        write_rows(tmp_path / part / f"data.{ending}", ROWS if part == "train" else [{"text": "held out"}])
    for name, text in NOTES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_all(tmp_path) == sorted([*TEXTS[:20], "held out"])
    assert sizes(tmp_path) == {f"data.{ending}"}


def test_metadata_beside_texts_is_left_out(tmp_path):
    for number, text in enumerate(TEXTS[:9]):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "metadata.json").write_text('{"author": "nobody"}')
    assert read_all(tmp_path) == sorted(TEXTS[:9])


def test_a_folder_of_one_object_a_file_is_read(tmp_path):
    for number, text in enumerate(TEXTS[:9]):
        indent = 2 if number % 2 else None
        (tmp_path / f"{number}.json").write_text(json.dumps({"text": text, "n": number}, indent=indent))
    assert read_all(tmp_path) == sorted(TEXTS[:9])


@pytest.mark.parametrize(("one", "other"), [("data.jsonl", "book.txt"), ("a.parquet", "b.jsonl"), ("a.json", "b.txt")])
def test_two_kinds_of_data_are_both_named(tmp_path, one, other):
    for name in (one, other):
        write_rows(tmp_path / name, ROWS)
    with pytest.raises(UserError, match="several kinds") as error:
        read_all(tmp_path)
    assert one in str(error.value) and other in str(error.value)
    with pytest.raises(UserError, match="several kinds"):
        files_of(Corpus(str(tmp_path)))


def test_much_markdown_beside_rows_is_data_too(tmp_path):
    write_rows(tmp_path / "index.jsonl", ROWS)
    for number in range(9):
        (tmp_path / f"chapter{number}.md").write_text("\n".join(TEXTS))
    with pytest.raises(UserError, match="several kinds"):
        read_all(tmp_path)


NOISE = random.Random(0).randbytes(999).hex().encode()
DAMAGED = {
    "line.jsonl": (b'{"text": "one"}\n\n{"text": "two"\n', "line.jsonl, line 3: this is not valid JSON"),
    "more.jsonl": (b'{"text": "one"} and more\n', "more.jsonl, line 1: this is not valid JSON"),
    "list.json": (b'[{"text": "one"},\n{"text": }]', "list.json, line 2: this is not valid JSON"),
    "latin.jsonl": (b'{"text": "one"}\n{"text": "caf\xe9"}\n', "latin.jsonl, line 2: this is not UTF-8"),
    "latin.json": (b'[{"text": "one"},\n {"text": "caf\xe9"}]', "latin.json, line 2: this is not UTF-8"),
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8"),
    "wide.txt": ("wide".encode("utf-16"), "wide.txt is not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(NOISE)[:-99], "cut.jsonl.gz cannot be read"),
    "cut.txt.zst": (zstandard(NOISE)[:-99], "cut.txt.zst cannot be read"),
    "cut.txt.xz": (lzma.compress(b"some text" * 99)[:-20], "cut.txt.xz cannot be read"),
    "plain.jsonl.gz": (b'{"text": "one"}\n', "plain.jsonl.gz cannot be read"),
    "cut.parquet": (b"PAR1abc", "cut.parquet cannot be read"),
    "empty.parquet": (b"", "empty.parquet cannot be read"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl: column 'text' holds 3"),
    "scalar.jsonl": (b"3\n", "scalar.jsonl, line 1: a row must be an object"),
    "long.csv": (b"n,text\n1,some\n\n2,some, and more\n", "long.csv, the row that ends in line 4: it has 3 fields"),
    "short.tsv": (b"n\ttext\n1\n", "short.tsv, the row that ends in line 2: it has 1 fields"),
    "quote.csv": (b'text\n"one\ntwo" three\n', "quote.csv, the row that ends in line 3: ',' expected after"),
    "open.csv": (b'text\n"one\n', "open.csv, the row that ends in line 2: unexpected end"),
    "big.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "big.jsonl is a pointer"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_the_file_that_cannot_be_read_is_named(tmp_path, name):
    data, says = DAMAGED[name]
    ending = name.split(".")[1]
    write_rows(tmp_path / f"good.{ending}", ROWS)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read_all(tmp_path)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_tables_are_read_where_there_is_nothing_else(tmp_path, name):
    """Fields may hold separators, quotes, line breaks and more characters than Python's own limit."""
    texts = ['one, "two"\tthree', "four\nfive\n\nsix", "seven " * 30_000]
    write_rows(tmp_path / name, [{"n": number, "text": text} for number, text in enumerate([*texts, ""])])
    (tmp_path / "README.md").write_text("About it.")
    (tmp_path / "meta.json").write_text('{"rows": 9}')
    assert read_all(tmp_path) == read_all(tmp_path / name) == sorted(texts)
    assert sizes(tmp_path) == {name} and not unread_of(Corpus(str(tmp_path)))


@pytest.mark.parametrize("beside", ["book.txt", "rows.jsonl", "rows.parquet", "notes.md"])
def test_tables_beside_other_text_are_not_read_and_named(tmp_path, beside):
    """So the digest of such a folder is the one that it always had. Notes count where there are more of them."""
    write_rows(tmp_path / "deep" / "table.csv", [{"text": "no"}])
    if "rows" in beside:
        write_rows(tmp_path / beside, ROWS)
    else:
        (tmp_path / beside).write_text("some text " * 9)
    assert sizes(tmp_path) == {beside} and "no" not in read_all(tmp_path)
    (line,) = unread_of(Corpus(str(tmp_path)))
    assert line.startswith(f"{tmp_path}: 1 file is not read, 1 .csv (deep/table.csv); text is read from .jsonl,")


def test_files_that_are_not_read_are_counted_by_their_endings(tmp_path):
    write_rows(tmp_path / "train" / "data.jsonl", ROWS)
    for name, text in NOTES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("LICENSE", "Readme.rst", ".git/index", ".gitattributes", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no data")
    assert not unread_of(Corpus(str(tmp_path))) and not unread_of(Corpus()) and not unread_of(Corpus("org/set"))
    for name in ("b.pdf", "a.PDF", "train/c.pdf", "x.docx", "y.csv.gz", "y.csv", "z.arrow", "Makefile"):
        (tmp_path / name).touch()
    other = Corpus(str(tmp_path / "train" / "data.jsonl"))
    (line,) = unread_of(Mixture((Corpus(str(tmp_path)), other), (0.5, 0.5)))
    assert "8 files are not read, 3 .pdf, 2 .csv, 1 " in line and "2 of other kinds (such as Makefile)" in line


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["data-0.arrow", "state.json", "dataset_info.json"], "only 1 .arrow (data-0.arrow): give files that end in"),
        (["a.pdf", "b.pdf", "c.docx"], "only 2 .pdf, 1 .docx (such as a.pdf): give files that end in .jsonl"),
        (["README"], "holds no text that is read: give files"),
        ([], "holds no text that is read: give files that end in .jsonl, .ndjson, .json, .parquet, .txt, .md, .csv"),
    ],
)
def test_a_folder_of_other_files_is_refused_with_what_it_holds(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_text('{"citation": ""}')
    with pytest.raises(UserError) as error:
        read_all(tmp_path)
    assert says in str(error.value)
    assert ("`to_parquet` of the package datasets" in str(error.value)) == (".arrow" in says)


def test_a_link_to_nothing_is_named(tmp_path):
    write_rows(tmp_path / "good.jsonl", ROWS)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl is a link to a file that is not there"):
        read_all(tmp_path)


def test_empty_files_and_lines_and_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:9])
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n \r\n")
    (tmp_path / "list.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS[9:]).encode())
    assert read_all(tmp_path) == sorted(TEXTS[:20])
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_all(tmp_path / "marked.txt") == ["one\ntwo"]


COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard}


@pytest.mark.parametrize("how", COMPRESS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "txt", "parquet", "csv"])
def test_each_kind_is_read_compressed_and_in_several_parts(tmp_path, ending, how):
    plain = write_rows(tmp_path / f"plain.{ending}", ROWS)
    data, half = plain.read_bytes(), plain.stat().st_size // 2
    path = tmp_path / f"data.{ending}.{how}"
    path.write_bytes(COMPRESS[how](data[:half]) + COMPRESS[how](data[half:]))
    assert read_all(path) == read_all(plain) != []


def test_objects_over_several_lines_and_lists_of_strings_are_read(tmp_path):
    (tmp_path / "objects.json").write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    (tmp_path / "strings.json").write_text(json.dumps(["some", "strings"]))
    assert read_all(tmp_path) == sorted([*TEXTS[:20], "some", "strings"])


def test_half_a_surrogate_pair_is_no_reason_to_stop(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(r'{"text": "half \ud83d here"}' + "\n" + r'{"text": "whole \ud83d\ude00 here"}' + "\n")
    assert read_all(path) == ["half ? here", "whole 😀 here"]


@pytest.mark.parametrize(
    ("unit", "ends"),
    [
        ("some words on a line\n", "\n"),
        ("This is a sentence that goes on. ", ". "),
        ("words without an end ", " "),
        ("x", "x"),
        ("这是一个句子。", "。"),
    ],
    ids=["lines", "sentences", "words", "characters", "ideographs"],
)
def test_a_long_text_without_empty_lines_has_every_split(tmp_path, unit, ends):
    """Nothing lost, nothing cut within a line where there are lines, and pieces of about the same size."""
    rng = random.Random(unit)
    after = "" if ends == "x" else unit
    whole = "".join(f"{rng.random()}{after}" for _ in range(2_400_000 // (18 + len(unit))))
    (tmp_path / "book.txt").write_text(whole)
    pieces = {split: list(Corpus(str(tmp_path / "book.txt")).documents(split, 0)) for split in SPLITS}
    flat = sum(pieces.values(), [])
    assert all(pieces.values())
    assert sum(map(len, flat)) == len(whole) and all(piece in whole for piece in flat)
    assert all(20_000 <= len(piece) < 40_000 for piece in flat if not whole.endswith(piece))
    if ends != "x":
        assert all(piece.endswith(ends) for piece in flat)


def test_empty_lines_are_where_a_text_is_cut_before_all_others(tmp_path):
    paragraphs = [f"Paragraph {number}.\n" + "A sentence. And more.\n" * 250 for number in range(400)]
    (tmp_path / "book.txt").write_text("\n \n".join(paragraphs))
    assert all(text.startswith("Paragraph") for text in read_all(tmp_path))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt", "csv"])
def test_a_reader_of_several_files_goes_on_from_any_place(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(flashmorph.data.corpus, "_BLOCK", 7)
    for number in range(4):
        texts = [f"{number}: {text}" for text in TEXTS[:30]]
        write_rows(tmp_path / f"{number}.{ending}", [{"text": text, "n": number or "0"} for text in texts])
    corpus = Corpus(str(tmp_path))
    for seed in (1, 2):
        whole = [(document.text, vars(position)) for document, position in corpus.read("train", seed)]
        for number in range(0, len(whole), 9):
            position = Position(**json.loads(json.dumps(whole[number][1])))
            assert [document.text for document, _ in corpus.read("train", seed, position)] == [
                text for text, _ in whole[number + 1 :]
            ]


def test_files_are_read_in_an_order_that_the_seed_shuffles(tmp_path, monkeypatch):
    monkeypatch.setattr(flashmorph.data.corpus, "_BLOCK", 1)
    for number in range(9):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"{number}: {text}" for text in TEXTS[:9]])
    orders = [[text[0] for text in Corpus(str(tmp_path)).documents("train", seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_a_big_file_is_not_loaded_whole(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as stream:
        stream.writelines(json.dumps({"text": f"{number} " + "long " * 100}) + "\n" for number in range(5_000))
        stream.write("not JSON")
    documents = Corpus(str(path)).documents("train", 0)
    assert len([next(documents) for _ in range(500)]) == 500


def test_digests_list_what_is_read_of_each_part(tmp_path):
    for name in ("one/a.jsonl", "one/README.md", "two/b.parquet", "two/.c.parquet"):
        write_rows(tmp_path / name, ROWS)
    parts = tuple(Corpus(str(tmp_path / name)) for name in ("one", "two"))
    files = [tmp_path / "one/a.jsonl", tmp_path / "two/b.parquet"]
    assert files_of(Mixture(parts, (0.5, 0.5))) == files
