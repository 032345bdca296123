"""Rows of `extend`: documents joined, or only those that fill rows; and the context that a token sees in them."""

import json

import numpy as np
import pytest
from conftest import run_command
from test_cli import refused
from test_corpus import write_jsonl
from tokenizers_of_all_kinds import make_tokenizer

import flashmorph.data.rows
from flashmorph.data.corpus import Corpus, Mixture
from flashmorph.data.rows import Rows, pack
from flashmorph.errors import UserError
from flashmorph.recipe.recipe import load_recipe
from flashmorph.stages import ExtendSettings

LENGTH = 32
SHORT = [f"Document {number} says: {number * number}.\n" for number in range(60)]
LONG = ["Document: " + " ".join(f"word {number}" for number in range(20 + 7 * size)) for size in range(30)]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return Corpus(str(write_jsonl(tmp_path / "texts.jsonl", SHORT + LONG)))


@pytest.mark.parametrize("template", ["none", "before"])
def test_long_documents_give_as_many_whole_rows_as_they_fill(tmp_path, corpus, template):
    tokenizer = make_tokenizer("metaspace", template)
    before = [tokenizer.bos_token_id] if template == "before" else []
    expected = []
    for text in corpus.documents("train", 0):
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        room = LENGTH - len(before)
        expected += [[*before, *ids[start : start + room]] for start in range(0, len(ids) - room + 1, room)]
    rows = pack(corpus, tokenizer, "train", LENGTH, len(expected), 0, tmp_path / "rows.npy", 1, long_documents=True)
    found = [rows[row] for row in range(len(rows))]
    assert [row["input_ids"] for row in found] == expected and len(expected) > 40
    assert all(row["starts"] == [0] for row in found)
    assert rows.mean_context(True) == rows.mean_context(False) == (LENGTH - 1) / 2
    with pytest.raises(UserError, match=f"texts.jsonl is too small: .* in documents of at least {LENGTH} for"):
        pack(corpus, tokenizer, "train", LENGTH, len(expected) + 1, 0, tmp_path / "more", 1, long_documents=True)


def test_long_rows_of_a_mixture_keep_its_shares_and_go_on_after_a_kill(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(flashmorph.data.rows, "_KEEP_TOKENS", 3 * LENGTH)
    tokenizer = make_tokenizer("byte-level", "before")
    other = Corpus(str(write_jsonl(tmp_path / "other.jsonl", [f"other {text}" for text in LONG])))
    mixture, rows = Mixture((corpus, other), (0.5, 0.5)), 40

    def work(path, stop: int | None = None) -> bytes:
        def report(done: float, total: float) -> None:
            if done == stop:
                raise KeyboardInterrupt

        pack(mixture, tokenizer, "train", LENGTH, rows, 0, path, None, report, [[9] * LENGTH] * 5, True)
        return path.read_bytes()

    whole = work(tmp_path / "whole.npy")
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "rows.npy", 20)
    assert work(tmp_path / "rows.npy") == whole
    written = Rows(tmp_path / "whole.npy")
    assert sum(written[row]["input_ids"] == [9] * LENGTH for row in range(rows)) == 5


def test_where_no_document_is_long_enough_that_is_said(tmp_path, capsys, teacher_folder, recipe_file):
    path = write_jsonl(tmp_path / "texts.jsonl", SHORT)
    with pytest.raises(UserError, match=r"no document of 512 tokens or more .*`documents: joined`"):
        pack(Corpus(str(path)), make_tokenizer("metaspace"), "train", 512, 4, 0, tmp_path / "rows", long_documents=True)
    assert [file.name for file in tmp_path.iterdir()] == ["texts.jsonl"]


def test_the_mean_context_is_that_of_every_token(tmp_path, corpus, monkeypatch):
    tokenizer = make_tokenizer("byte-level", "before")
    rows = pack(corpus, tokenizer, "train", LENGTH, 50, 0, tmp_path / "rows.npy")
    seen = []
    for row in range(50):
        begun = 0
        for place in range(LENGTH):
            begun = place if place in rows[row]["starts"] else begun
            seen.append(place - begun)
    assert 0 < rows.mean_context(True) < rows.mean_context(False) == (LENGTH - 1) / 2
    assert rows.mean_context(True) == pytest.approx(np.mean(seen))
    monkeypatch.setattr(flashmorph.data.rows, "_KEEP_TOKENS", 7 * LENGTH)
    assert rows.mean_context(True) == pytest.approx(np.mean(seen))


def test_extend_says_how_documents_stand_and_how_far_a_token_sees(tmp_path, capsys, teacher_folder, recipe_file):
    options = ("morph", teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "out")
    for documents in ("joined", "long"):
        dry = (*options, "--dry-run", "--set", f"extend.documents={documents}")
        assert run_command(*dry, "--json") == 0
        stages = {row["stage"]: row["mean_context"] for row in json.loads(capsys.readouterr().out)}
        assert stages["extend"] == 63.5 and stages["distill"] is stages["align"] is stages["select"] is None
    assert run_command(*dry) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean context" in printed and "by the text" in printed
    sentence = refused(capsys, *options, "--set", "extend.isolate_documents=true")
    assert "extend.documents: joined" in sentence and "long" in sentence
    assert "'joined' or 'long'" in refused(capsys, *options, "--set", "extend.documents=apart")
    assert not (tmp_path / "out").exists()
    assert load_recipe("default").extend.documents == ExtendSettings().documents == "joined"


def test_records_tell_the_mean_context(tmp_path, teacher_folder, recipe_file):
    output = tmp_path / "out"
    assert run_command("extend", teacher_folder, "--recipe", recipe_file, "--output", output, "--layers", "0",
                       "--set", "extend.documents=long", "--set", "extend.length=64") == 0  # fmt: skip
    records = {}
    for path in (output / "stages").glob("*/stage.json"):
        record = json.loads(path.read_text())
        records[record["stage"]] = record
    rows = {path.name.split("-")[0]: Rows(path) for path in (output / "data").glob("*.npy")}
    assert records["extend"]["documents"] == "long" and records["extend"]["mean_context"] == 31.5
    for stage in ("align", "distill"):
        assert records[stage]["mean_context"] == pytest.approx(rows[stage].mean_context(True))
        assert 0 < records[stage]["mean_context"] <= 31.5
    assert all(rows["extend"][row]["starts"] == [0] for row in range(len(rows["extend"])))


def test_rows_of_long_documents_have_a_file_of_their_own(teacher_folder, recipe_file, tmp_path):
    command = ("extend", teacher_folder, "--recipe", recipe_file, "--output", tmp_path, "--layers", "0")
    assert run_command(*command, "--set", "extend.length=64") == 0
    assert run_command(*command, "--set", "extend.length=64", "--set", "extend.documents=long") == 0
    assert len([*tmp_path.glob("data/extend-*.npy")]) == 2
