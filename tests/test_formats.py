"""Rows in the formats of TRL and Alpaca: what they say, what is learned of them, and which are refused."""

import json
from itertools import product
from pathlib import Path

import datasets
import pytest
from conftest import run_command, tiny_tokenizer
from test_chat import MARKED, PLAIN, chatty, documents, tool
from test_textfiles import ROWS, write_rows
from tokenizers_of_all_kinds import BEFORE, KINDS, make_tokenizer

from flashmorph.data.chat import Unfit, encode_chat
from flashmorph.data.corpus import Corpus
from flashmorph.data.documents import FIRST, IGNORED, Part
from flashmorph.data.formats import Document, document_of, split_of
from flashmorph.data.identity import has_conversations
from flashmorph.data.rows import pack
from flashmorph.errors import UserError
from flashmorph.recipe.preflight import reach_text
from flashmorph.recipe.recipe import load_recipe

TOKENIZERS = [pytest.param(*each, id=" ".join(each)) for each in product(KINDS, BEFORE)]
BORDERS = [
    ("The sky is", " blue."),
    ("Question: what? Answer: ", "yes"),
    ("Document 1", "23 says"),
    ("é", "✓ and more"),
    ("", "all of it"),
]


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def learned(row: dict) -> list[int]:
    return [token for index, token in enumerate(row["input_ids"]) if index not in {*row["ignored"]}]


def of_train(make, number: int) -> list[dict]:
    """So many rows of `make(number)` whose documents are in the split `train`."""
    rows, place = [], 0
    while len(rows) < number:
        row = make(place)
        document = document_of(row, "text", "here")
        rows += [row] if document and document.split == "train" else []
        place += 1
    return rows


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_a_prompt_and_its_completion_are_one_text(tmp_path, ending):
    rows = [{"id": number, "prompt": f"{number} and", "completion": f" {number + 1}"} for number in range(30)]
    found = documents(Corpus(str(write_rows(tmp_path / f"rows.{ending}", rows))))
    assert [(each.text, each.messages) for each in found] == sorted(
        (row["prompt"] + row["completion"], None) for row in rows
    )
    assert all(each.text[each.prompt :].startswith(" ") for each in found)
    assert {each.split == split_of(each.text) for each in found} == {True}


@pytest.mark.parametrize(("kind", "template"), TOKENIZERS)
@pytest.mark.parametrize("learn_ends", [False, True])
def test_the_completion_is_learned_in_the_tokens_of_the_whole_text(tmp_path, kind, template, learn_ends):
    """A token that the prompt and the completion share is learned; the whole is what it is without a prompt."""
    tokenizer = make_tokenizer(kind, template)
    before = tokenizer.convert_tokens_to_ids(BEFORE[template])
    for prompt, completion in BORDERS:
        text = prompt + completion
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        source = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": completion}]))
        marks = {}
        for replies_only in (False, True):
            corpus = Corpus(source, replies_only=replies_only)
            stored = Part(corpus, 1.0, tokenizer, split_of(text), 0, None, learn_ends=learn_ends).next()
            assert (stored & ~(FIRST | IGNORED)).tolist() == [*before, *encoded.input_ids, tokenizer.eos_token_id]
            targets = (stored & IGNORED == 0).tolist()
            assert targets[-1] == learn_ends and not any(targets[: len(before)])
            marks[replies_only] = targets[len(before) : -1]
        learned_tokens = [token for token, mark in zip(encoded.input_ids, marks[True], strict=True) if mark]
        assert all(marks[False]) and marks[True] == sorted(marks[True])
        known = tokenizer.unk_token_id is None or tokenizer.unk_token_id not in learned_tokens
        assert not known or completion.strip() in tokenizer.decode(learned_tokens)
        # Offsets may leave out the space at which a completion begins: then that token is learned too.
        reaching = sum(end > len(prompt) for _, end in encoded.offset_mapping)
        assert len(learned_tokens) - reaching in (0, 1)


def test_a_teacher_without_a_template_learns_completions(tmp_path):
    """Text is worded by no template, so none is asked for, by the checks before a run either."""
    rows = [{"prompt": f"question {number}?", "completion": f" answer {number}"} for number in range(90)]
    corpus, tokenizer = Corpus(str(write_rows(tmp_path / "rows.jsonl", rows)), replies_only=True), tiny_tokenizer()
    packed = pack(corpus, tokenizer, "train", 32, 20, 0, tmp_path / "rows.npy", None)
    text = tokenizer.decode(sum((learned(packed[row]) for row in range(20)), []))
    assert "answer" in text and "question" not in text
    write_rows(tmp_path / "rows.jsonl", [*rows, *ROWS])
    with pytest.raises(UserError, match="is for conversations, or texts with `prompt` and `completion`"):
        pack(corpus, tokenizer, "train", 32, 20, 0, tmp_path / "others.npy", None)


def test_packing_goes_on_from_any_row(tmp_path, monkeypatch):
    monkeypatch.setattr("flashmorph.data.rows._KEEP_TOKENS", 16 * 3)
    monkeypatch.setattr("flashmorph.data.documents._TOGETHER", 500)
    rows = [{"prompt": f"question {number}?", "completion": f" answer {number}"} for number in range(90)]
    corpus, tokenizer = Corpus(str(write_rows(tmp_path / "rows.parquet", rows)), replies_only=True), tiny_tokenizer()

    def stop(done: float, total: float) -> None:
        if done == 17:
            raise KeyboardInterrupt

    settings = (corpus, tokenizer, "train", 16, 40, 0)
    with pytest.raises(KeyboardInterrupt):
        pack(*settings, tmp_path / "rows.npy", None, stop)
    pack(*settings, tmp_path / "rows.npy", None)
    pack(*settings, tmp_path / "whole.npy", None)
    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


PROMPT = [said("system", "be brief"), said("user", "one"), said("assistant", "two"), said("user", "three")]
COMPLETION = [said("assistant", "four"), said("user", "five"), said("assistant", "six")]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("in_json", [False, True])
def test_lists_of_messages_are_one_conversation_of_which_the_completion_is_learned(tmp_path, template, ending, in_json):
    tokenizer, tools = chatty(template), [tool("find")]
    row = {"prompt": PROMPT, "completion": COMPLETION, "tools": json.dumps(tools)}
    if in_json:
        row |= {name: json.dumps(row[name]) for name in ("prompt", "completion")}
    (document,) = documents(Corpus(str(write_rows(tmp_path / f"rows.{ending}", [row]))))
    (same,) = documents(
        Corpus(str(write_rows(tmp_path / "same.jsonl", [{"messages": PROMPT + COMPLETION, "tools": tools}])))
    )
    assert document == same and document.split == same.split and document.prompt == len(PROMPT)
    encode = (tokenizer, document.messages, True, document.tools)
    (ids, targets), (whole, every) = encode_chat(*encode, document.prompt or 0), encode_chat(*encode)
    assert ids == whole == tokenizer.apply_chat_template(PROMPT + COMPLETION, tools=tools)["input_ids"]
    end = tokenizer.eos_token
    assert tokenizer.decode([i for i, mark in zip(ids, targets, strict=True) if mark]) == f"four{end}six{end}"
    assert tokenizer.decode([i for i, mark in zip(ids, every, strict=True) if mark]) == f"two{end}four{end}six{end}"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_completion_without_a_reply_and_a_prompt_that_is_worded_otherwise_are_reasons(template):
    with pytest.raises(Unfit, match="no message is a reply"):
        encode_chat(chatty(template), [*PROMPT, said("user", "again")], True, None, len(PROMPT))
    counts = chatty("{{ messages | length }}" + template)
    with pytest.raises(Unfit, match="words the beginning of a conversation in another way"):
        encode_chat(counts, PROMPT + COMPLETION, True, None, len(PROMPT))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_an_instruction_its_input_and_its_output_are_a_conversation(tmp_path, ending):
    rows = [
        {"instruction": "Add them.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {"instruction": "Say more.", "input": " \n", "output": "More."},
    ]
    expected = {"Add them.\n\n1 and 2": "3", "Say hello.": "Hello.", "Say more.": "More."}
    source = write_rows(tmp_path / f"rows.{ending}", rows)
    found = documents(Corpus(str(source)))
    assert [each.messages for each in found] == [
        [said("user", asked), said("assistant", reply)] for asked, reply in expected.items()
    ]
    assert has_conversations(Corpus(str(source)))
    ids, targets = encode_chat(chatty(), found[0].messages or [], True)
    assert chatty().decode([i for i, mark in zip(ids, targets, strict=True) if mark]) == f"3{chatty().eos_token}"


def test_the_column_conversation_is_one(tmp_path):
    talk = [said("user", "hello"), said("assistant", "good day")]
    for name, value in (("lists", talk), ("json", json.dumps(talk)), ("said", [{"from": "human", "value": "hello"}])):
        source = write_rows(tmp_path / f"{name}.jsonl", [{"conversation": value}])
        (document,) = documents(Corpus(str(source)))
        assert document.messages == (talk if name != "said" else talk[:1]) and has_conversations(Corpus(str(source)))
    assert Corpus("x", column="conversation").names_chat


TALK = [said("user", "hello"), said("assistant", "good day")]
ALL = {
    "text": "text",
    "messages": TALK,
    "conversations": TALK[:1],
    "conversation": TALK[1:],
    "prompt": "prompt",
    "completion": "completion",
    "instruction": "instruction",
    "output": "output",
}


def test_of_several_formats_the_first_is_read():
    """Text, then conversations, then a prompt with its completion, then an instruction with its output; nulls are
    nothing, and a column that is named is read alone."""
    row, texts = dict(ALL), []
    for name in ("text", "messages", "conversations", "conversation", "completion", "output"):
        document = document_of(row, "text", "here")
        texts.append(document and document.text)
        row[name] = None
    expected = ["text", "hello\n\ngood day", "hello", "good day", "promptcompletion", "instruction\n\noutput"]
    assert texts == expected
    assert document_of(ALL, "prompt", "here") == Document("prompt")
    assert document_of({"instruction": "a", "prompt": "b", "output": "c"}, "text", "here") == Document(
        "a\n\nc", [said("user", "a"), said("assistant", "c")]
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": ""},
        {"prompt": TALK[:1], "completion": []},
        {"prompt": None, "completion": None},
        {"instruction": "a", "output": ""},
        {"instruction": "", "input": " ", "output": "a"},
        {"text": None, "prompt": "a"},
        {"text": None, "prompt": "a", "completion": None},
        {"text": "", "prompt": "a", "completion": "b"},
    ],
)
def test_rows_without_words_are_passed_over(row):
    """Where there is a column of text, rows without text are as they were before other formats were known."""
    assert document_of(row, "text", "here") is None


WRONG = {
    "text and list": ({"prompt": "a", "completion": TALK[1:]}, "'prompt' is a text and 'completion' is a list of mess"),
    "list and text": (
        {"prompt": TALK[:1], "completion": "b"},
        "'prompt' is a list of messages and 'completion' is a t",
    ),
    "json and text": ({"prompt": TALK, "completion": json.dumps(TALK)}, "give two texts, or two lists of messages"),
    "number": ({"prompt": "a", "completion": 7}, "'completion' is 7 in a row"),
    "one message": ({"prompt": TALK[:1], "completion": TALK[1]}, "'completion' is {'content': 'good day'"),
    "null completion": ({"prompt": "a", "completion": None}, "a row has 'prompt' and no 'completion'"),
    "null prompt": ({"prompt": None, "completion": "b"}, "a row has 'completion' and no 'prompt'"),
    "null output": ({"instruction": "a", "output": None}, "a row has 'instruction' and no 'output'"),
    "list of outputs": ({"instruction": "a", "input": "", "output": ["b"]}, "'output' is ['b'] in a row with 'instr"),
    "no completion": (
        {"prompt": "a", "chosen": "b"},
        "it has 'prompt', 'chosen': 'prompt' is read with 'completion' be",
    ),
    "no output": ({"instruction": "a", "response": "b"}, "'instruction' is read with 'output' beside it; name yours"),
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_refused_in_one_sentence(tmp_path, name, ending):
    row, says = WRONG[name]
    good = {"prompt": "good", "completion": " row"} if ending == "jsonl" else row
    with pytest.raises(UserError) as error:
        documents(Corpus(str(write_rows(tmp_path / f"rows.{ending}", [good, row]))))
    text = str(error.value)
    assert says in text and f"rows.{ending}" in text and len(text.splitlines()) == 1 and len(text) < 400


def test_texts_that_look_like_json_are_texts():
    for prompt, completion in (("list(())", "[]"), ("[]", "[]"), ("{}", "{}"), ("[1, 2]", "[3]")):
        document = document_of({"prompt": prompt, "completion": completion}, "text", "here")
        assert document and document.text == prompt + completion and document.messages is None


def test_the_same_text_is_in_one_split_and_held_out_once(tmp_path):
    text = next(f"held out {number}" for number in range(999) if split_of(f"held out {number}") == "test")
    rows = [
        {"text": text},
        {"prompt": text[:4], "completion": text[4:]},
        {"prompt": text[:6], "completion": text[6:]},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert {each.split for each in documents(Corpus(str(source)))} == {"test"}
    part = Part(Corpus(str(source)), 1.0, tiny_tokenizer(), "test", 0)
    assert len(list(part.once())) == 1


def test_columns_of_other_formats_in_files_with_text_change_nothing(tmp_path):
    """The documents of a file that was read before, and so the rows of its finished stages, are what they were."""
    plain = [{"text": f"text {number}"} if number % 3 else {"text": None} for number in range(30)]
    more = [{**row, "prompt": "a", "input": {"b": [1]}, "output": number} for number, row in enumerate(plain)]
    found = [documents(Corpus(str(write_rows(tmp_path / f"{name}.jsonl", rows))))
             for name, rows in (("plain", plain), ("more", more))]  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 20


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": "b", "id": 1}, ""),
        ({"instruction": "a", "input": "", "output": "b"}, "no chat template"),
        ({"conversation": [said("user", "a"), said("assistant", "b")]}, "no chat template"),
        ({"text": "a"}, "`loss_on: replies` is for conversations"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "org/set has no column 'text'; it has 'prompt', 'chosen'"),
    ],
)
def test_the_first_row_of_a_dataset_decides_before_the_first_stage(recipe_file, monkeypatch, row, says):
    """A dataset of the hub is not read before a run, but for its first documents."""
    stream = datasets.IterableDataset.from_generator(lambda: iter([row] * 9))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream)
    recipe = load_recipe(recipe_file, {"data.source": "org/set", "data.loss_on": "replies"})
    if not says:
        reach_text(recipe, tiny_tokenizer())
        return
    with pytest.raises(UserError) as error:
        reach_text(recipe, tiny_tokenizer())
    assert says in str(error.value)


def test_a_run_takes_each_format(teacher_folder, recipe_file, tmp_path, capsys):
    """As far as before its first stage: the checks and the plan of the work."""
    make = {
        "completion": lambda n: {"prompt": f"question {n}", "completion": " word" * 40},
        "talk": lambda n: {"prompt": [said("user", f"{n}")], "completion": [said("assistant", "word " * 40)]},
        "alpaca": lambda n: {"instruction": f"question {n}", "input": "", "output": "word " * 40},
    }
    talks = Path(tmp_path / "teacher")
    chatty().save_pretrained(talks)
    for name in ("config.json", "model.safetensors"):
        (talks / name).write_bytes((teacher_folder / name).read_bytes())
    for name, row in make.items():
        source = write_rows(tmp_path / f"{name}.jsonl", [row(number) for number in range(300)])
        options = ("--recipe", recipe_file, "--data", source, "--allow-repeat", "--output", tmp_path / "out")
        replies = ("--set", "data.loss_on=replies", "--dry-run")
        assert run_command("morph", talks, *options, *replies) == 0, capsys.readouterr().err
        plain = 0 if name == "completion" else 2
        assert run_command("morph", teacher_folder, *options, *replies) == plain
        assert plain == 0 or "no chat template" in capsys.readouterr().err
