"""Text: its splits, where it can come from, and rows packed from it."""

import gzip
import json
import lzma
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer

from flashmorph.data import supply
from flashmorph.data.corpus import Corpus
from flashmorph.data.formats import split_of
from flashmorph.data.rows import pack
from flashmorph.errors import UserError
from flashmorph.tasks import SPLITS

TEXTS = [f"Document {number} says: {'word ' * (number % 7)}{number * number}.\n" for number in range(200)]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"number": place, column: text}) + "\n" for place, text in enumerate(texts)))
    return path


def read(source: Path | str, split: str, seed: int = 0, column: str = "text") -> list[str]:
    return list(Corpus(str(source), column=column).documents(split, seed))


def read_all(source: Path | str, column: str = "text") -> list[str]:
    return sorted(text for split in SPLITS for text in read(source, split, column=column))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(str(write_jsonl(tmp_path_factory.mktemp("text") / "texts.jsonl", TEXTS)))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Breaks:
    """A tokenizer that fails after some documents."""

    def __init__(self, tokenizer, good_calls: int, error: BaseException):
        self._tokenizer, self._left, self._error = tokenizer, good_calls, error
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(self, text, **settings):
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._tokenizer(text, **settings)


def test_splits_share_no_document_and_lose_none(corpus):
    splits = {split: list(corpus.documents(split, 0)) for split in SPLITS}
    assert sorted(sum(splits.values(), [])) == sorted(TEXTS)
    assert all(split_of(text) == split for split, texts in splits.items() for text in texts)
    assert len(splits["train"]) > 3 * len(splits["test"]) > 0


def test_held_out_splits_are_small_and_none_is_empty():
    counts = {split: sum(split_of(f"text {number}") == split for number in range(4000)) for split in SPLITS}
    assert sum(counts.values()) == 4000
    assert all(0.03 < counts[split] / 4000 < 0.07 for split in SPLITS if split != "train")


def test_a_text_stays_in_its_split_in_every_version_and_process():
    known = {"train": "text 0", "test": "text 6", "referee": "text 12", "validation": "text 19"}
    assert {split_of(text): text for text in known.values()} == known


def test_the_split_does_not_depend_on_seed_or_order(corpus, tmp_path):
    turned = Corpus(str(write_jsonl(tmp_path / "turned.jsonl", TEXTS[::-1])))
    for split in SPLITS:
        texts = list(corpus.documents(split, 0))
        assert set(texts) == set(corpus.documents(split, 7)) == set(turned.documents(split, 0))
    assert list(corpus.documents("train", 0)) == list(corpus.documents("train", 0))
    assert list(corpus.documents("train", 0)) != list(corpus.documents("train", 7))


def test_an_unknown_split_is_refused(corpus):
    with pytest.raises(ValueError, match="train, validation, referee, test"):
        list(corpus.documents("dev", 0))


def test_the_shipped_text_has_every_split():
    corpus = Corpus()
    sizes = {split: sum(map(len, corpus.documents(split, 0))) for split in SPLITS}
    assert all(size > 20_000 for size in sizes.values())
    assert sizes["train"] > 1_000_000


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("First line.\n\nSecond paragraph: é ✓\n")
    assert read_all(path) == ["First line.\n\nSecond paragraph: é ✓\n"]


def test_a_folder_holds_one_document_a_text_file(tmp_path):
    (tmp_path / "deep").mkdir()
    for place, text in enumerate(TEXTS[:30]):
        (tmp_path / ("deep" if place % 2 else ".") / f"{place}.{'md' if place % 3 else 'txt'}").write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read_all(tmp_path) == sorted(TEXTS[:30])


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress], ids=["xz", "gz"])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_compressed_files_are_read(tmp_path, ending, compress):
    plain = write_jsonl(tmp_path / "plain", TEXTS[:9]).read_bytes() if ending == "jsonl" else TEXTS[0].encode()
    path = tmp_path / f"data.{ending}.{'xz' if compress is lzma.compress else 'gz'}"
    path.write_bytes(compress(plain))
    assert read_all(path) == (sorted(TEXTS[:9]) if ending == "jsonl" else TEXTS[:1])


def test_parquet_and_a_json_list_are_read(tmp_path):
    pq.write_table(pa.table({"text": TEXTS[:20], "n": list(range(20))}), tmp_path / "data.parquet")
    assert read_all(tmp_path / "data.parquet") == sorted(TEXTS[:20])
    (tmp_path / "data.json").write_text(json.dumps([{"text": text} for text in TEXTS[:20]]))
    assert read_all(tmp_path / "data.json") == sorted(TEXTS[:20])


@pytest.mark.parametrize("name", ["DATA.PARQUET", "data.parquet.gz", "data.jsonl.GZ", "data.jsonl"])
def test_how_much_text_there_can_be_is_known_of_files_of_every_name(tmp_path, name):
    """From a sample of ten of 400 documents of ten tokens each: all of them, and half as many for safety."""
    texts = ["word " * 10] * 400
    path = tmp_path / name
    if "parquet" in name.lower():
        pq.write_table(pa.table({"text": texts}), path)
    else:
        write_jsonl(path, texts)
    if name.lower().endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    size = len(write_jsonl(tmp_path / "sample", texts[:10]).read_bytes())
    assert supply._at_most(Corpus(str(path)), 100, 10, size) == pytest.approx(1.5 * 4_000, rel=0.1)


def test_another_column_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", TEXTS[:9], column="content")
    assert read_all(path, column="content") == sorted(TEXTS[:9])


def test_a_missing_column_is_refused_with_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", TEXTS[:9], column="content")
    with pytest.raises(UserError, match=r"no column 'text'; it has 'number', 'content'"):
        read_all(path)


def test_rows_without_text_are_passed_over(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": null}\n{"text": ""}\n{"text": "something"}\n')
    assert read_all(path) == ["something"]


def test_a_file_name_with_brackets_is_a_file_name(tmp_path):
    path = tmp_path / "Moby Dick [1851].txt"
    path.write_text("Call me Ishmael.")
    assert read_all(path) == ["Call me Ishmael."]


@pytest.mark.parametrize("source", ["there/is/nothing.jsonl", "/nowhere/at/all", "nobody/no-such-dataset"])
def test_a_source_that_is_not_there_is_refused(source):
    with pytest.raises(UserError) as error:
        read_all(source)
    assert repr(source) in str(error.value) and "\n" not in str(error.value)


def empty_folder(folder):
    return folder


def folder_without_text(folder):
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def other_kind_of_file(folder):
    (folder / "table.xlsx").write_bytes(b"PK")
    return folder / "table.xlsx"


@pytest.mark.parametrize("make", [empty_folder, folder_without_text, other_kind_of_file])
def test_a_place_without_readable_files_is_refused(tmp_path, make):
    with pytest.raises(UserError, match="holds no text"):
        read_all(make(tmp_path))


UNREADABLE = {
    "empty.txt": b"",
    "empty.jsonl": b"",
    "cut.jsonl": b'{"text": "one"}\n{"text": ',
    "numbers.jsonl": b'{"text": 3}\n{"text": 4}\n',
    "latin1.txt": "café".encode("latin1"),
    "empty.parquet": b"",
    "cut.parquet": b"PAR1abc",
    "cut.jsonl.xz": lzma.compress(b'{"text": "some text"}\n' * 100)[:-30],
    "plain.jsonl.xz": b'{"text": "not compressed"}\n',
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_empty_or_damaged_file_is_refused(tmp_path, name, caplog):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    with pytest.raises(UserError) as error:
        for split in SPLITS:
            Corpus(str(tmp_path / name)).pool(split, 0)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_split_without_a_document_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "data.jsonl", [text for text in TEXTS if split_of(text) == "train"])
    with pytest.raises(UserError, match="no text for the split 'test'"):
        Corpus(str(path)).pool("test", 0)
    with pytest.raises(UserError, match="no text for the split 'test'"):
        pack(Corpus(str(path)), tokenizer, "test", 8, 1, 0, tmp_path / "rows.npy", None)
    assert not list(tmp_path.glob("*rows*"))


def test_a_pool_stops_at_its_size(corpus):
    pool = corpus.pool("train", 0, characters=300)
    assert 300 <= sum(map(len, pool)) < 300 + max(map(len, TEXTS))
    assert pool == list(corpus.documents("train", 0))[: len(pool)]


def test_packed_rows_are_the_documents_end_to_end(corpus, tokenizer, tmp_path):
    rows = pack(corpus, tokenizer, "train", 32, 20, 3, tmp_path / "rows.npy")
    assert len(rows) == 20
    flat = sum((rows[row]["input_ids"] for row in range(20)), [])
    expected = []
    for text in corpus.documents("train", 3):
        expected += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert {len(rows[row]["input_ids"]) for row in range(20)} == {32}
    assert flat == expected[: 20 * 32]


def test_repeated_passes_are_each_shuffled_anew(corpus, tokenizer, tmp_path):
    once = sum(len(tokenizer(text).input_ids) + 1 for text in corpus.documents("train", 0))
    flat = np.array([row["input_ids"] for row in pack(corpus, tokenizer, "train", once, 2, 0, tmp_path / "rows.npy")])
    assert sorted(flat[0]) == sorted(flat[1])
    assert (flat[0] != flat[1]).any()


def test_packing_is_deterministic_and_follows_the_seed(corpus, tokenizer, tmp_path):
    def content(name, seed):
        pack(corpus, tokenizer, "train", 32, 20, seed, tmp_path / name)
        return (tmp_path / name).read_bytes()

    assert content("one.npy", 0) == content("two.npy", 0) != content("three.npy", 1)


def test_a_text_that_is_too_small_is_refused_with_the_way_out(corpus, tokenizer, tmp_path):
    once = sum(len(tokenizer(text).input_ids) + 1 for text in corpus.documents("train", 0))
    assert len(pack(corpus, tokenizer, "train", once, 2, 0, tmp_path / "enough.npy", max_passes=2)) == 2
    with pytest.raises(UserError, match="--allow-repeat") as error:
        pack(corpus, tokenizer, "train", once, 3, 0, tmp_path / "rows.npy", max_passes=2)
    assert f"{once:,} tokens" in str(error.value) and f"{3 * once:,} are needed" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["enough.npy"]
    assert len(pack(corpus, tokenizer, "train", once, 3, 0, tmp_path / "rows.npy", max_passes=None)) == 3


def test_rows_that_are_there_are_not_tokenised_again(corpus, tokenizer, tmp_path):
    first = pack(corpus, tokenizer, "train", 32, 4, 0, tmp_path / "rows.npy")
    never = Breaks(tokenizer, 0, AssertionError("tokenised again"))
    again = pack(corpus, never, "train", 32, 4, 0, tmp_path / "rows.npy")
    assert list(first) == list(again)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_interrupted_packing_leaves_nothing(corpus, tokenizer, tmp_path, error):
    with pytest.raises(type(error)):
        pack(corpus, Breaks(tokenizer, 0, error), "train", 32, 20, 0, tmp_path / "rows.npy")
    assert list(tmp_path.iterdir()) == []
    assert len(pack(corpus, tokenizer, "train", 32, 20, 0, tmp_path / "rows.npy")) == 20


@pytest.mark.parametrize("number", [1, 5, 7, 20])
def test_other_rows_stand_among_those_of_text_at_regular_intervals(corpus, tokenizer, tmp_path, number):
    others = [[5000 + row] * 16 for row in range(number)]
    rows = pack(corpus, tokenizer, "train", 16, 20, 0, tmp_path / "rows.npy", others=others)
    mixed = [rows[row]["input_ids"] for row in range(20)]
    places = [place for place, row in enumerate(mixed) if row[0] >= 5000]
    assert [mixed[place] for place in places] == others
    gaps = np.diff([-1, *places])
    assert gaps[1:].max(initial=1) - gaps[1:].min(initial=20) <= 1 and gaps.max() <= -(-20 // number)
    text = sum((row for row in mixed if row[0] < 5000), [])
    if number < 20:
        plain = pack(corpus, tokenizer, "train", 16, 20 - number, 0, tmp_path / "plain.npy")
        assert text == sum((plain[row]["input_ids"] for row in range(20 - number)), [])


def test_progress_is_told_to_the_last_row(corpus, tokenizer, tmp_path):
    seen = []
    pack(corpus, tokenizer, "train", 32, 20, 0, tmp_path / "rows.npy", report=lambda *counts: seen.append(counts))
    assert seen == sorted(seen) and len(seen) > 5
    assert seen[0][0] > 0 and 0.9 < seen[-1][0] / seen[-1][1] <= 1


def test_one_big_text_file_has_every_split(tmp_path):
    """Cut at empty lines, nothing lost, nothing in two splits."""
    paragraphs = [f"Paragraph {number}.\n" + "words and more words\n" * 100 for number in range(900)]
    whole = "\n".join(paragraphs)
    (tmp_path / "book.txt").write_text(whole)
    pieces = {split: list(Corpus(str(tmp_path / "book.txt")).documents(split, 0)) for split in SPLITS}
    assert all(pieces.values())
    assert sum(len(piece) for some in pieces.values() for piece in some) == len(whole)
    found = [re.findall(r"Paragraph (\d+)", piece) for some in pieces.values() for piece in some]
    assert sorted(int(number) for numbers in found for number in numbers) == list(range(900))
    assert all(piece.startswith("Paragraph") for some in pieces.values() for piece in some)


def test_a_folder_called_demo_does_not_change_the_demo_text(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("something else\n")
    expected = [len(text) for text in Corpus().documents("train", 0)]
    monkeypatch.chdir(tmp_path)
    assert [len(text) for text in Corpus().documents("train", 0)] == expected


def test_rows_tell_where_documents_begin(corpus, tokenizer, tmp_path):
    """A document is what stands from one start to the next, across rows; ids are those of the text alone."""
    rows = pack(corpus, tokenizer, "train", 40, 30, 0, tmp_path / "rows.npy")
    end = tokenizer.eos_token_id
    before = None
    for number in range(len(rows)):
        ids, starts = rows[number]["input_ids"], rows[number]["starts"]
        assert max(ids) < len(tokenizer) and starts[0] == 0
        assert starts[1:] == [place + 1 for place, token in enumerate(ids[:-1]) if token == end]
        before = ids if before is None else before + ids
    assert tokenizer.decode(before).startswith("Document")


def test_other_rows_are_single_documents(corpus, tokenizer, tmp_path):
    question = [tokenizer.eos_token_id] * 40
    rows = pack(corpus, tokenizer, "train", 40, 4, 0, tmp_path / "rows.npy", others=[question, question])
    found = [rows[number] for number in range(4)]
    assert [row["starts"] for row in found if row["input_ids"] == question] == [[0], [0]]
    assert any(len(row["starts"]) > 1 for row in found)
