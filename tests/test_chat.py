"""Conversations as people have them: tools, parts, nulls of columnar files, other roles; and what is learnt of them."""

import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer

import flashmorph.data.documents
import flashmorph.data.rows
from flashmorph.data.chat import Unfit, encode_chat, messages_in, tools_in
from flashmorph.data.corpus import Corpus
from flashmorph.data.formats import Document
from flashmorph.data.rows import pack
from flashmorph.errors import UserError
from flashmorph.tasks import SPLITS

BODY = "{{ message.content if message.content is string else '' }}"
CALLS = (
    "{% if message.tool_calls %}{% for call in message.tool_calls %}[{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}]{% endfor %}{% endif %}"
)
WORDS = "{{ '<' + message.role + '>' }}" + BODY + CALLS + "{{ eos_token }}"
END = "{% if add_generation_prompt %}<assistant>{% endif %}"
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
PLAIN = TOOLS + "{% for message in messages %}" + WORDS + "{% endfor %}" + END
MARKED = (
    TOOLS
    + "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{% generation %}"
    + BODY
    + CALLS
    + "{{ eos_token }}{% endgeneration %}{% else %}"
    + WORDS
    + "{% endif %}{% endfor %}"
)
# How families tell a call of tools from words: by a key that is there, or by one that is there and not none.
BY_KEY = PLAIN.replace(
    BODY + CALLS, "{% if 'tool_calls' in message %}" + CALLS + "{% else %}{{ message.content }}{% endif %}"
)
BY_NONE = BY_KEY.replace("'tool_calls' in message", "message.tool_calls is defined and message.tool_calls is not none")
ADDS = PLAIN.replace(BODY, "{{ message['content'] + '' }}")
PRINTS = PLAIN.replace(BODY, "{{ message['content'] | trim }}")
TAKES_PARTS = PLAIN.replace(
    BODY,
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "({{ part.type }}){{ part.text }}{% endfor %}{% endif %}",
)


def test_rows_that_no_one_would_write_are_one_sentence(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": ["a"], "value": "x"}, {"from": "gpt", "value": "y"}]}))
    (document,) = Corpus(str(path)).every()
    assert [message["role"] for message in document.messages or []] == ["['a']", "assistant"]
    deep: list = []
    for _ in range(900):
        deep = [deep]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": deep}]}))
    with pytest.raises(UserError, match="rows.jsonl: column 'messages' holds a value that is nested too deep"):
        list(Corpus(str(path)).every())
    assert Document("text", [], [{"made": date(2026, 1, 2)}]).split in SPLITS


def chatty(template: str = PLAIN):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tool(name: str, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": parameters}}


def call(name: str, **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def with_tools() -> list[dict]:
    """Rows with different tools, so that a columnar file has nulls in each."""
    first = [
        {"role": "user", "content": "where is order 7"},
        {"role": "assistant", "content": None, "tool_calls": [call("find", order_id=7)]},
        {"role": "tool", "content": "on its way", "name": "find"},
        {"role": "assistant", "content": "it is on its way"},
    ]
    second = [
        {"role": "user", "content": "weather in Ulm"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Ulm", days=2)]},
        {"role": "assistant", "content": "rain"},
    ]
    third = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    find, weather = (
        tool("find", order_id={"type": "integer"}),
        tool("weather", city={"type": "string", "enum": ["Ulm"]}),
    )
    tools = [[find], [weather, find], None]
    return [{"messages": talk, "tools": each} for talk, each in zip((first, second, third), tools, strict=True)]


def written(folder: Path, rows: list[dict], form: str) -> Corpus:
    path = folder / f"talks.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(str(path))


def documents(corpus: Corpus) -> list[Document]:
    found = [document for split in SPLITS for document, _ in corpus.read(split, 0)]
    return sorted(found, key=lambda document: document.text)


def tokens(tokenizer, corpus: Corpus, replies_only: bool = False) -> list[list[int]]:
    return [encode_chat(tokenizer, each.messages or [], replies_only, each.tools)[0] for each in documents(corpus)]


def expected(tokenizer, rows: list[dict]) -> list[list[int]]:
    """What apply_chat_template makes of the rows as they were written."""
    rows = sorted(rows, key=lambda row: row["messages"][0]["content"])
    return [tokenizer.apply_chat_template(row["messages"], tools=row["tools"])["input_ids"] for row in rows]


def columnar(rows: list[dict]) -> list[dict]:
    """The rows with the nulls that a columnar reader puts in."""
    return pa.Table.from_pylist(rows).to_pylist()


@pytest.mark.parametrize("template", [PLAIN, MARKED, BY_KEY, BY_NONE])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("replies_only", [False, True])
def test_tools_reach_the_template_from_any_file(tmp_path, template, form, replies_only):
    tokenizer, rows = chatty(template), with_tools()
    assert tokens(tokenizer, written(tmp_path, rows, form), replies_only) == expected(tokenizer, rows)


def test_nulls_that_columns_put_in_are_nothing_and_the_same_in_json(tmp_path):
    tokenizer, rows = chatty(), with_tools()
    filled = columnar(rows)
    assert '"order_id": null' in json.dumps(filled)
    from_json = tokens(tokenizer, written(tmp_path, filled, "jsonl"))
    assert from_json == expected(tokenizer, rows)
    assert "null" not in tokenizer.decode(sum(from_json, []))


def test_nulls_in_lists_are_values():
    enum = {"type": "function", "function": {"name": "f", "enum": ["a", None], "strict": None}}
    assert tools_in([enum]) == [{"type": "function", "function": {"name": "f", "enum": ["a", None]}}]


@pytest.mark.parametrize("write", [json.dumps, lambda tools: tools and [json.dumps(tool) for tool in tools]])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_tools_may_be_written_as_json(tmp_path, write, form):
    tokenizer, rows = chatty(), with_tools()
    in_json = [{**row, "tools": write(row["tools"])} for row in rows]
    assert tokens(tokenizer, written(tmp_path, in_json, form)) == expected(tokenizer, rows)


def test_conversations_may_be_written_as_json(tmp_path):
    tokenizer, rows = chatty(), with_tools()
    in_json = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
    assert tokens(tokenizer, written(tmp_path, in_json, "jsonl")) == expected(tokenizer, rows)


@pytest.mark.parametrize("tools", ["no JSON", "[1]", 7, {"name": "f"}, "[" * 100_000])
def test_tools_that_are_none_are_a_reason(tools):
    with pytest.raises(Unfit, match="'tools' holds neither a list of tools nor one in JSON"):
        encode_chat(chatty(), [{"role": "user", "content": "hello"}], False, tools_in(tools))


@pytest.mark.parametrize("template", [PLAIN, ADDS, PRINTS])
def test_content_that_is_not_there_is_nothing(template):
    """Templates that add it up get an empty string, and none gets the word None."""
    talk = messages_in(with_tools()[0]["messages"]) or []
    text = chatty().decode(encode_chat(chatty(template), talk, True)[0])
    assert "find" in text and "order_id" in text and "None" not in text


NO_WORDS = {
    "none": PLAIN.replace(CALLS, ""),
    "by none": BY_KEY.replace("'tool_calls' in message", "message.content is none"),
}


@pytest.mark.parametrize("template", NO_WORDS)
def test_calls_that_a_template_has_no_words_for_are_a_reason(template):
    """Also where it asks whether content is none: transformers leaves out what is none before a template sees it."""
    with pytest.raises(Unfit, match="no words for the tools that it calls"):
        encode_chat(chatty(NO_WORDS[template]), messages_in(with_tools()[0]["messages"]) or [], True)


def test_a_reply_before_all_messages_is_a_reason():
    talk = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hello"}]
    assert encode_chat(chatty(MARKED), talk, True) and encode_chat(chatty(), talk, False)
    with pytest.raises(Unfit, match="begins with a reply"):
        encode_chat(chatty(), talk, True)


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": 'and "two"\n'}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
]
JOINED = [{"role": "user", "content": 'one and "two"\n'}, {"role": "assistant", "content": "three"}]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("replies_only", [False, True])
@pytest.mark.parametrize("template", [PLAIN, MARKED, ADDS, PRINTS, TAKES_PARTS])
def test_content_in_parts_is_worded(tmp_path, template, replies_only, form):
    """As it is by templates that take parts, as one string by the others."""
    tokenizer = chatty(template)
    found = tokens(tokenizer, written(tmp_path, [{"messages": PARTS}], form), replies_only)
    taken = PARTS if template == TAKES_PARTS else JOINED
    assert found == [tokenizer.apply_chat_template(taken)["input_ids"]]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", None])
def test_parts_that_are_not_text_are_a_reason(kind):
    part = {"type": kind, "url": "x"} if kind else {"image": "x"}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "see"}, part]},
        {"role": "assistant", "content": "yes"},
    ]
    with pytest.raises(Unfit, match="not text"):
        encode_chat(chatty(), talk, True)


def test_each_conversation_counts_for_its_split(tmp_path):
    """Also those in which nothing is said but in parts and calls; and one is in the same split from either file."""
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": f"part {n}"}]}] for n in range(200)]
    calls = [[{"role": "assistant", "content": None, "tool_calls": [call("f", n=n)]}] for n in range(200)]
    for talks in (parts, calls):
        rows = [{"messages": talk} for talk in talks]
        shares = {
            form: [len(list(written(tmp_path, rows, form).read(split, 0))) for split in SPLITS]
            for form in ("jsonl", "parquet")
        }
        assert shares["jsonl"] == shares["parquet"] and sum(shares["jsonl"]) == 200
        assert all(0 < number < 190 for number in shares["jsonl"])
    rows = [{"messages": [{"role": "user", "content": "go"}], "tools": [tool(f"f{n}")]} for n in range(200)]
    assert all(0 < len(list(written(tmp_path, rows, "jsonl").read(split, 0))) < 190 for split in SPLITS)


def talks_of(role: str, number: int = 60, turns: int = 1) -> list[dict]:
    turn = [{"role": "user", "content": "question"}, {"role": role, "content": "reply"}]
    return [
        {"messages": [{**message, "content": f"{message['content']} {place}"} for message in turn * turns]}
        for place in range(number)
    ]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_source_without_a_reply_is_refused_with_its_roles(tmp_path, template):
    corpus = Corpus(written(tmp_path, talks_of("model"), "jsonl").source, replies_only=True)
    with pytest.raises(UserError) as error:
        pack(corpus, chatty(template), "train", 16, 10, 0, tmp_path / "rows.npy")
    says = str(error.value)
    assert "has a reply to learn" in says and "'assistant'" in says and "'user', 'model'" in says
    assert len(says.splitlines()) == 1 and not list(tmp_path.glob("rows*"))


def test_conversations_of_which_nothing_is_learnt_are_left_out_and_counted(tmp_path, caplog):
    silent = [*talks_of("model", 90), {"messages": []}, *({"messages": []} for _ in range(3))]
    rows = [*silent, *talks_of("assistant", 200)]
    corpus, tokenizer = Corpus(written(tmp_path, rows, "jsonl").source, replies_only=True), chatty()
    found = pack(corpus, tokenizer, "train", 32, 250, 0, tmp_path / "rows.npy", None)
    text = tokenizer.decode(sum((found[row]["input_ids"] for row in range(250)), []))
    assert "<model>" not in text and text.count("<assistant>") > 200
    train = [talk for talk in documents(corpus) if talk.split == "train" and talk.messages]
    number = sum(talk.messages[1]["role"] == "model" for talk in train if talk.messages)
    assert f"{number} since" in caplog.text and "'user', 'model'" in caplog.text


def long_talks(folder: Path) -> Corpus:
    """A user who says much more than a row holds, and short replies."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n} " + "word " * 150},
                {"role": "assistant", "content": f"reply {n}"},
            ]
        }
        for n in range(80)
    ]
    return Corpus(written(folder, rows, "jsonl").source, replies_only=True)


def learns(row: dict) -> bool:
    """Whether a token is learnt that another one of its document predicts."""
    return bool(set(range(len(row["input_ids"]))) - set(row["ignored"]) - set(row["starts"]))


def test_no_row_is_without_a_token_to_learn(tmp_path, monkeypatch):
    corpus, tokenizer = long_talks(tmp_path), chatty()
    whole = pack(corpus, tokenizer, "train", 16, 40, 0, tmp_path / "whole.npy", None)
    assert len(whole) == 40 and all(learns(whole[row]) for row in range(40))
    assert any("word" in tokenizer.decode(whole[row]["input_ids"]) for row in range(40))

    monkeypatch.setattr(flashmorph.data.rows, "_KEEP_TOKENS", 16 * 3)
    monkeypatch.setattr(flashmorph.data.documents, "_TOGETHER", 500)

    def stop(done: float, total: float) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(corpus, tokenizer, "train", 16, 40, 0, tmp_path / "rows.npy", None, stop)
    seen = []
    pack(corpus, tokenizer, "train", 16, 40, 0, tmp_path / "rows.npy", None, lambda *done: seen.append(done[0]))
    assert seen[0] > 3 and (tmp_path / "rows.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_rows_without_a_token_to_learn_use_up_the_text(tmp_path):
    """So there may be too little of it, where there would be enough with every row."""
    corpus, tokenizer = long_talks(tmp_path), chatty()
    tokens = sum(len(encode_chat(tokenizer, each.messages or [], True)[0]) for each in documents(corpus))
    with pytest.raises(UserError, match="is too small") as error:
        pack(corpus, tokenizer, "train", 16, tokens // 16, 0, tmp_path / "rows.npy", max_passes=1)
    assert "--allow-repeat" in str(error.value)


def test_a_source_that_never_has_a_row_to_learn_is_refused(tmp_path, monkeypatch):
    """Here replies always stand where nothing predicts them."""
    monkeypatch.setattr(flashmorph.data.documents, "encode_chat", lambda *_: ([5] * 16, [True] + [False] * 15))
    with pytest.raises(UserError, match="no row of 16 tokens has one to learn"):
        pack(long_talks(tmp_path), chatty(), "train", 16, 10, 0, tmp_path / "rows.npy", None)
    assert not list(tmp_path.glob("rows*"))


def test_what_most_conversations_are_left_out_for_is_told(tmp_path, caplog):
    refuses = "{% for m in messages[1:] %}{% if m.role == messages[loop.index0].role %}{{ raise_exception('twice') }}"
    refuses += (
        "{% endif %}{% endfor %}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    twice = [{"messages": [{"role": "user", "content": f"{n}"}] * 2} for n in range(30)]
    system = [{"messages": [{"role": "system", "content": f"be {n}"}]} for n in range(9)]
    picture = {"type": "image", "image": "a.png"}
    image = [{"messages": [{"role": "user", "content": [picture, {"type": "text", "text": f"{n}"}]}]} for n in range(9)]
    corpus = written(tmp_path, [*twice, *system, *image, *talks_of("assistant")], "jsonl")
    pack(corpus, chatty(refuses + PLAIN), "train", 32, 20, 0, tmp_path / "rows.npy", None)
    assert all(reason in caplog.text for reason in ("since twice", "since no system", "'image' and not text"))


def test_roles_are_known_in_other_words_and_capitals():
    """`User` in a template that knows `user` would be a turn of nobody, and no reply be found."""
    said = [
        {"role": name, "content": "x"} for name in ("System", "User", "Assistant", "human", "GPT", "Customer", "TOOL")
    ]
    roles = [message["role"] for message in messages_in(said) or []]
    assert roles == ["system", "user", "assistant", "user", "assistant", "Customer", "tool"]
    assert [message["role"] for message in messages_in([{"from": "Human", "value": "x"}]) or []] == ["user"]
