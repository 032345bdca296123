"""The documents that a run lays questions out in are read from their source once."""

from types import SimpleNamespace

import pytest

from flashmorph import distributed
from flashmorph.data.corpus import Corpus
from flashmorph.recipe.recipe import load_recipe
from flashmorph.run.pools import Pools


@pytest.fixture
def asked(monkeypatch):
    """The splits that were read from the corpus."""
    splits, really = [], Corpus.pool

    def pool(self, split, seed, characters=200_000):
        splits.append(split)
        return really(self, split, seed, characters)

    monkeypatch.setattr(Corpus, "pool", pool)
    return splits


@pytest.fixture
def run(tmp_path):
    """What is read of a run."""
    recipe, said = load_recipe("demo", {}), []
    screen = SimpleNamespace(say=said.append, said=said)
    return SimpleNamespace(recipe=recipe, corpus=Corpus(), folder=SimpleNamespace(data=tmp_path), screen=screen)


def test_each_split_is_read_once(run, asked):
    first = {split: Pools(run).pool(split, 0) for split in ("train", "test")}
    assert asked == ["train", "test"]
    assert {split: Pools(run).pool(split, 0) for split in ("train", "test")} == first and len(asked) == 2
    assert first["train"] == Corpus().pool("train", 0) and not set(first["train"]) & set(first["test"])
    assert Pools(run).pool("train", 1) != first["train"]


def test_another_text_has_another_pool(run, asked, tmp_path):
    Pools(run).pool("train", 0)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "Row {number} of another text."}}\n' for number in range(60)))
    run.corpus = Corpus(str(text))
    assert all("another text" in document for document in Pools(run).pool("train", 0)) and len(asked) == 2


@pytest.mark.parametrize("damage", ["", "[", "[]", '["a", 1]', "{}"])
def test_a_damaged_file_is_made_again_and_said(run, asked, tmp_path, damage):
    expected = Pools(run).pool("test", 0)
    (path,) = tmp_path.glob("pool-test-*.json")
    path.write_text(damage)
    assert Pools(run).pool("test", 0) == expected and asked == ["test", "test"]
    assert len(run.screen.said) == 1 and "making it again" in run.screen.said[0]


def test_other_ranks_than_0_read_what_it_keeps(run, asked, monkeypatch):
    expected = Pools(run).pool("test", 0)
    asked.clear()
    monkeypatch.setattr(distributed, "first", lambda work: None)
    assert Pools(run).pool("test", 0) == expected and not asked
