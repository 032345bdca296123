"""Packing that is killed, mixtures of sources, and conversations: what ends up in the rows on disk."""

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_command, tiny_tokenizer
from test_corpus import write_jsonl

import flashmorph.data.corpus
import flashmorph.data.documents
import flashmorph.data.formats
import flashmorph.data.rows
from flashmorph.data.corpus import Corpus, Mixture, Position
from flashmorph.data.rows import Rows, pack
from flashmorph.errors import UserError
from flashmorph.recipe.recipe import DataSettings
from flashmorph.tasks.turns import ends_turns

LENGTH, ROWS = 16, 120
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
LAST_IN_OTHER_WORDS = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' and loop.last %}(thinks)"
    "{% endif %}{{ message.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = {"plain": TEMPLATE, "marked": MARKED_TEMPLATE, "the last in other words": LAST_IN_OTHER_WORDS}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chatty():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def in_small_steps(monkeypatch):
    """Blocks, batches and positions that are small enough for several of each."""
    monkeypatch.setattr(flashmorph.data.corpus, "_BLOCK", 30)
    monkeypatch.setattr(flashmorph.data.documents, "_TOGETHER", 100)
    monkeypatch.setattr(flashmorph.data.rows, "_KEEP_TOKENS", 3 * LENGTH)


def texts(number: int, word: str = "word") -> list[str]:
    return [f"Document {place} says: {word * (place % 7)}{place * place}.\n" for place in range(number)]


def talk(number: int, turns: int = 2) -> list[dict[str, str]]:
    said = (("user", "question"), ("assistant", "reply"))
    return [{"role": role, "content": f"{word} {number}.{turn}"} for turn in range(turns) for role, word in said]


def write_talks(path: Path, number: int, key: str = "messages") -> Path:
    path.write_text("".join(json.dumps({key: talk(place)}) + "\n" for place in range(number)))
    return path


def sources(folder: Path) -> dict[str, Corpus | Mixture]:
    """One of each kind: a file, several files, and two that are mixed."""
    several = folder / "several"
    several.mkdir()
    for number in range(3):
        pq.write_table(pa.table({"text": texts(60 + number, "parquet ")}), several / f"{number}.parquet")
    one = Corpus(str(write_jsonl(folder / "one.jsonl", texts(300))))
    other = Corpus(str(write_jsonl(folder / "other.jsonl", texts(200, "other "))))
    return {"one": one, "several": Corpus(str(several)), "mixture": Mixture((one, other), (0.7, 0.3))}


def packed(corpus, tokenizer, path: Path, report=lambda *done: None) -> bytes:
    others = [[9] * LENGTH] * 11
    pack(corpus, tokenizer, "train", LENGTH, ROWS, 5, path, None, report, others)
    return path.read_bytes()


def killed_after(rows: int, *arguments) -> None:
    """Pack in a process of its own that is killed after so many rows."""
    child = os.fork()
    if child == 0:
        calls = iter(range(rows))

        def report(*done: float) -> None:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        packed(*arguments, report)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["one", "several", "mixture"])
def test_packing_that_is_killed_at_any_time_goes_on_and_ends_with_the_same_file(
    tmp_path, tokenizer, kind, in_small_steps
):
    corpus, chance = sources(tmp_path)[kind], random.Random(kind)
    counted: list[float] = []
    whole = packed(corpus, tokenizer, tmp_path / "whole.npy", lambda *done: counted.append(done[0]))
    path, position = tmp_path / "rows.npy", tmp_path / "rows.npy.partial" / "position.json"
    rows = [0]
    while not path.exists() and len(rows) < 6:
        killed_after(chance.randrange(20, 40), corpus, tokenizer, path)
        rows.append(json.loads(position.read_text())["rows"] if position.exists() else ROWS)
    assert rows == sorted(rows) and 0 < rows[1] < ROWS
    seen: list[float] = []
    assert packed(corpus, tokenizer, path, lambda *done: seen.append(done[0])) == whole
    assert len(seen) < len(counted) and not position.parent.exists()


def test_a_position_that_is_damaged_or_of_another_reader_begins_again(tmp_path, tokenizer, in_small_steps):
    corpus = sources(tmp_path)["one"]
    whole = packed(corpus, tokenizer, tmp_path / "whole.npy")
    path, partial = tmp_path / "rows.npy", tmp_path / "rows.npy.partial"

    def stop(*done: float) -> None:
        if done[0] > 60:
            raise KeyboardInterrupt

    for spoil in (
        lambda: (partial / "position.json").write_text('{"rows": 3'),
        lambda: (partial / "rows.npy").write_bytes(b"short"),
        lambda: (partial / "rows.npy").unlink(),
        lambda: (partial / "position.json").write_text(
            (partial / "position.json").read_text().replace('"datasets": "', '"datasets": "0.')
        ),
    ):
        with pytest.raises(KeyboardInterrupt):
            packed(corpus, tokenizer, path, stop)
        spoil()
        assert packed(corpus, tokenizer, path) == whole
        path.unlink()


def test_a_reader_goes_on_from_any_place(tmp_path, in_small_steps):
    corpus = sources(tmp_path)["one"]
    whole = list(corpus.read("train", 3))
    for number in (0, 17, 29, 30, 100, len(whole) - 1):
        place = Position(**json.loads(json.dumps(vars(whole[number][1]))))
        rest = [document for document, _ in corpus.read("train", 3, place)]
        assert rest == [document for document, _ in whole[number + 1 :]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence_and_what_is_packed_stays(tmp_path, tokenizer, in_small_steps, monkeypatch):
    corpus, path = sources(tmp_path)["one"], tmp_path / "rows.npy"
    partial = tmp_path / "rows.npy.partial"
    partial.mkdir()
    (partial / "rows.npy").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*rows.npy: No space left on device"):
        packed(corpus, tokenizer, path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1_000))
    with pytest.raises(UserError, match="1,000 bytes free and the rows of text need 7,680"):
        packed(corpus, tokenizer, path)
    assert not path.exists()


def test_a_mixture_keeps_its_shares_of_tokens_all_along(tmp_path, tokenizer):
    one = Corpus(str(write_jsonl(tmp_path / "one.jsonl", texts(400))))
    other = Corpus(str(write_jsonl(tmp_path / "other.jsonl", ["other " * (3 + place % 50) for place in range(400)])))
    rows = pack(Mixture((one, other), (0.7, 0.3)), tokenizer, "train", 64, 60, 0, tmp_path / "rows.npy", None)
    flat = sum((rows[row]["input_ids"] for row in range(60)), [])
    documents = "".join(tokenizer.decode(flat)).split(tokenizer.eos_token)
    for part in (documents[: len(documents) // 2], documents):
        sizes = [len(tokenizer(text).input_ids) + 1 for text in part]
        of_other = sum(size for size, text in zip(sizes, part, strict=True) if "other" in text)
        assert of_other / sum(sizes) == pytest.approx(0.3, abs=0.03)


def test_a_mixture_names_the_source_that_is_too_small(tmp_path, tokenizer):
    big = Corpus(str(write_jsonl(tmp_path / "big.jsonl", texts(400))))
    small = Corpus(str(write_jsonl(tmp_path / "small.jsonl", texts(12))))
    with pytest.raises(UserError, match="small.jsonl is too small"):
        pack(Mixture((big, small), (0.5, 0.5)), tokenizer, "train", 64, 60, 0, tmp_path / "rows.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"big.jsonl", "small.jsonl"}


def test_recipes_take_one_source_or_several(tmp_path):
    parts = [{"source": "a", "weight": 3}, {"source": "b", "weight": 1, "split": "train_sft", "loss_on": "replies"}]
    several = DataSettings.model_validate({"mixture": parts})
    assert several.corpus == Mixture((Corpus("a"), Corpus("b", split="train_sft", replies_only=True)), (0.75, 0.25))
    assert several.about == "75% a, 25% b"
    assert DataSettings.model_validate(several.model_dump(mode="json")) == several
    assert DataSettings(source="a", column="content").corpus == Corpus("a", None, "content")
    with pytest.raises(ValueError, match="either one source or a mixture"):
        DataSettings.model_validate({"source": "a", "mixture": parts})


def test_a_mistake_in_a_mixture_is_named(capsys, tmp_path, teacher_folder):
    file = tmp_path / "recipe.yaml"
    options = ("morph", teacher_folder, "--output", tmp_path / "out", "--recipe", file)
    for part, says in (
        ({"sorce": "a", "weight": 1}, "data.mixture"),
        ({"source": "a", "wieght": 1}, "data.mixture"),
        ({"source": "a", "weight": 0}, "greater than 0"),
        ({"source": "a", "weight": 1, "loss_on": "answers"}, "'all' or 'replies'"),
    ):
        file.write_text(
            json.dumps({"tasks": {"one": {"task": "many_keys", "num_keys": 1}}, "data": {"mixture": [part]}})
        )
        assert run_command(*options) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_rows_with_conversations_are_worded_by_the_template(tmp_path, chatty, key):
    path = write_talks(tmp_path / "talks.jsonl", 60, key)
    rows = pack(Corpus(str(path)), chatty, "train", 32, 20, 0, tmp_path / "rows.npy")
    flat = sum((rows[row]["input_ids"] for row in range(20)), [])
    text = chatty.decode(flat)
    assert text.startswith("<user>question ") and text.count("<assistant>reply ") > 20
    ends = [place for row in range(20) for place in rows[row]["starts"][1:]]
    assert ends and not any(rows[row]["ignored"] for row in range(20))


def test_share_gpts_rows_are_conversations(tmp_path, chatty):
    row = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]}
    (tmp_path / "talks.jsonl").write_text((json.dumps(row) + "\n") * 40)
    corpus = Corpus(str(tmp_path / "talks.jsonl"))
    rows = pack(
        corpus, chatty, flashmorph.data.formats.split_of("hello\n\ngood day"), 32, 4, 0, tmp_path / "rows.npy", None
    )
    end = chatty.eos_token
    assert chatty.decode(rows[0]["input_ids"]).startswith(f"<user>hello{end}<assistant>good day{end}")


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_replies_are_learnt(tmp_path, template):
    """Each reply with what ends it, whether the template marks them or not."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    corpus = Corpus(str(write_talks(tmp_path / "talks.jsonl", 60)), replies_only=True)
    rows = pack(corpus, tokenizer, "train", 32, 20, 0, tmp_path / "rows.npy")
    ids, learnt = [], []
    for row in range(20):
        ids += rows[row]["input_ids"]
        learnt += [place not in rows[row]["ignored"] for place in range(32)]
    spans, before = [], False
    for token, counts in zip(ids, learnt, strict=True):
        if counts:
            spans.append([token]) if not before else spans[-1].append(token)
        before = counts
    end = tokenizer.eos_token
    for span in spans[:-1]:
        text = tokenizer.decode(span)
        assert text.removeprefix("(thinks)").startswith("reply ") and text.rstrip("\n").endswith(end)
    assert len(spans) > 15
    silent = tokenizer.decode([token for token, counts in zip(ids, learnt, strict=True) if not counts])
    assert "reply" not in silent and silent.count("question") > 15


def test_what_a_template_refuses_is_left_out_and_told(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    said = [talk(number) for number in range(60)]
    for number in range(0, 60, 3):
        said[number].insert(0, {"role": "system", "content": "be brief"})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in said))
    rows = pack(Corpus(str(path)), tokenizer, "train", 32, 10, 0, tmp_path / "rows.npy")
    assert "brief" not in tokenizer.decode(sum((rows[row]["input_ids"] for row in range(10)), []))
    assert "conversations were left out: no system" in caplog.text
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in said[::3]))
    with pytest.raises(UserError, match="takes none of the .* conversations that were tried: no system"):
        pack(Corpus(str(path)), tokenizer, "train", 32, 10, 0, tmp_path / "other.npy")


def test_conversations_need_a_template_and_replies_need_conversations(
    capsys, tmp_path, tokenizer, chatty, teacher_folder
):
    talks = write_talks(tmp_path / "talks.jsonl", 60)
    with pytest.raises(UserError, match="no chat template: give text, or an instruction-tuned teacher"):
        pack(Corpus(str(talks)), tokenizer, "train", 32, 10, 0, tmp_path / "rows.npy")
    text = write_jsonl(tmp_path / "text.jsonl", texts(60))
    with pytest.raises(UserError, match="`loss_on: replies` is for conversations"):
        pack(Corpus(str(text), replies_only=True), chatty, "train", 32, 10, 0, tmp_path / "rows.npy")
    output = tmp_path / "out"
    assert run_command("morph", teacher_folder, "--output", output, "--recipe", "chat", "--set", "evaluate.length=256",
                       "--set", "select.search.length=256") == 2  # fmt: skip
    assert "no chat template" in capsys.readouterr().err and not output.exists()


def test_haystacks_of_a_mixture_hold_both(tmp_path):
    one = Corpus(str(write_jsonl(tmp_path / "one.jsonl", texts(100))))
    talks = Corpus(str(write_talks(tmp_path / "talks.jsonl", 100)))
    pool = Mixture((one, talks), (0.5, 0.5)).pool("train", 0, 2_000)
    of_talks = sum(len(text) for text in pool if text.startswith("question"))
    assert 0.3 < of_talks / sum(map(len, pool)) < 0.7


def test_tokens_that_are_not_learnt_do_not_change_the_ids(tmp_path):
    ids = np.array([[5, 6, 7, 8]], np.uint32)
    ids[0, 2] |= np.uint32(1 << 30)
    ids[0, 1] |= np.uint32(1 << 31)
    np.save(tmp_path / "rows.npy", ids)
    assert Rows(tmp_path / "rows.npy")[0] == {"input_ids": [5, 6, 7, 8], "starts": [0, 1], "ignored": [2]}


@pytest.mark.parametrize(
    "template, ends",
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}", False),
        ("{{ raise_exception('no') }}", False),
        (None, False),
    ],
    ids=["of every turn", "of replies", "refuses", "none"],
)  # fmt: skip
def test_the_end_of_a_turn_is_known(template, ends):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert ends_turns(tokenizer) == ends


@pytest.mark.parametrize("learn_ends", [True, False])
def test_the_end_of_a_text_is_a_target_or_is_not(tmp_path, learn_ends):
    tokenizer = tiny_tokenizer()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a short text of number {number}"}) + "\n" for number in range(200)))
    rows = pack(
        Corpus(str(texts)), tokenizer, "train", 64, 6, 0, tmp_path / "rows.npy", max_passes=None, learn_ends=learn_ends
    )
    for row in rows:
        ends = [place for place, token in enumerate(row["input_ids"]) if token == tokenizer.eos_token_id]
        assert len(ends) > 1 and set(ends).isdisjoint(row["ignored"]) == learn_ends
        others = {*range(64)} - {*ends}
        assert learn_ends or {*row["ignored"]} >= {*ends} and not others & {*row["ignored"]} - {0}
