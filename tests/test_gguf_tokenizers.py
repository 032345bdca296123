"""Tokenizers of GGUF files: SentencePiece by its scores, byte-level ones by their merges, special tokens as stated."""

import json

import pytest
from conftest import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashmorph.convert.gguf import checkpoint_of
from flashmorph.convert.gguf_tokenizer import tokenizer_of
from flashmorph.convert.teacher import open_teacher
from flashmorph.errors import UserError

pytest.importorskip("gguf")
from gguf_files import made, tiny_vocabulary, written

pytestmark = pytest.mark.usefixtures("cache")

TEXTS = (
    "The key of amber-17 is 20931.\nWhat?",
    " leads",
    "   three, then  two and a tab\t.",
    "\n\nlines\r\n",
    "Grüße 東京 😀🎉 e\u0301 \u00a0",
    "<0x0A> is no byte",
    " ",
    "",
)
WORDS = "the key of the amber tower is in the three lines that lead to what he said then there is a third theme".split()
CONTROL, USER_DEFINED = 3, 4


def sentencepiece(**changes) -> dict[str, object]:
    """A SentencePiece vocabulary by the names of its fields: unknown, control and byte tokens, then pieces by rank."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    merged = [left + right for left, right in json.loads(learned.to_str())["model"]["merges"]]
    letters = sorted(set("▁<>0xA.,?-üß" + "".join(WORDS)))
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*dict.fromkeys([*merged, *letters])]
    tail = ["<|end|>", "<think>"]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [*head, *pieces, *tail],
        "scores": [*[0.0] * len(head), *(-float(rank) for rank in range(len(pieces))), *[-1000.0] * 2],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), CONTROL, USER_DEFINED],
        **changes,
    }


def opened(vocabulary: dict[str, object], **others) -> PreTrainedTokenizerFast:
    return tokenizer_of("a.gguf", {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()} | others)


def by_score(vocabulary, text: str) -> list[str]:
    """SentencePiece's rule: of all pairs of neighbours that make a piece the best, the first of these; then bytes."""
    stated = zip(vocabulary["tokens"], vocabulary["scores"], vocabulary["token_type"], strict=True)
    scores = {token: score for token, score, kind in stated if kind == 1}
    pieces = list(text.replace(" ", "▁"))
    while True:
        pairs = [left + right for left, right in zip(pieces, pieces[1:], strict=False)]
        best = max((pair for pair in pairs if pair in scores), key=scores.__getitem__, default=None)
        if best is None:
            break
        place = pairs.index(best)
        pieces[place : place + 2] = [best]
    return [
        each for piece in pieces for each in ([piece] if piece in scores else map("<0x{:02X}>".format, piece.encode()))
    ]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_a_sentencepiece_vocabulary_cuts_by_its_scores(text, prefix):
    vocabulary = sentencepiece(add_space_prefix=prefix)
    tokenizer = opened(vocabulary)
    expected = by_score(vocabulary, " " + text if prefix and text else text)
    assert tokenizer.tokenize(text) == expected and any(len(piece) > 2 for piece in by_score(vocabulary, " the key"))
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_its_special_tokens_are_those_of_the_file(tmp_path):
    vocabulary = sentencepiece(padding_token_id=2)
    model = made("llama", vocab_size=len(vocabulary["tokens"]))
    teacher = open_teacher(str(written(model, tmp_path / "teacher.gguf", vocabulary=vocabulary)))
    tokenizer, end = teacher.tokenizer(), vocabulary["tokens"].index("<|end|>")
    assert len(tokenizer) == len(vocabulary["tokens"])
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    assert found == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    ids = tokenizer("the<|end|>the<think>")["input_ids"]
    assert ids[0] == 1 and ids[2] == end and ids[-1] == end + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the the<think>"
    assert (teacher.generation()["bos_token_id"], teacher.generation()["eos_token_id"]) == (1, 2)


def test_spaces_behind_special_tokens_of_phi_3_belong_to_them():
    phi, llama = (opened(sentencepiece(), **{"general.architecture": name}) for name in ("phi3", "llama"))
    assert phi("the<|end|>\n the")["input_ids"] == llama("the<|end|>the")["input_ids"]
    assert phi("the<s> the")["input_ids"] == llama("the<s> the")["input_ids"] != llama("the<s>the")["input_ids"]


@pytest.mark.parametrize(
    "vocabulary, begins",
    [
        (sentencepiece(), True),
        (sentencepiece(add_bos_token=False), False),
        ({**tiny_vocabulary("llama-bpe"), "bos_token_id": 0}, True),
        ({**tiny_vocabulary("llama-bpe"), "bos_token_id": 0, "add_bos_token": False}, False),
        ({**tiny_vocabulary("qwen2"), "bos_token_id": 0}, False),
        ({**tiny_vocabulary("qwen2"), "bos_token_id": 0, "add_bos_token": True}, True),
        ({**tiny_vocabulary("llama-bpe"), "add_bos_token": True}, False),
    ],
)
def test_a_text_begins_with_bos_where_the_file_says_so(vocabulary, begins, tmp_path):
    tokenizer = opened(vocabulary)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (each("key")["input_ids"][0] == each.bos_token_id) == begins
        assert each("key")["input_ids"][-1] != each.eos_token_id


def test_a_text_ends_with_eos_where_the_file_says_so():
    tokenizer = opened(sentencepiece(add_eos_token=True))
    assert tokenizer("the")["input_ids"][-1] == tokenizer.eos_token_id


def test_a_file_without_special_tokens_gets_none(tmp_path):
    vocabulary = {name: value for name, value in tiny_vocabulary().items() if name != "eos_token_id"}
    teacher = open_teacher(str(written(made("llama"), tmp_path / "teacher.gguf", vocabulary=vocabulary)))
    assert teacher.tokenizer().eos_token is None and teacher.generation().get("eos_token_id") is None


@pytest.mark.parametrize("pre, whole", [("llama-bpe", True), ("tekken", True), ("gpt-2", False)])
def test_a_word_that_is_a_token_stays_whole_in_the_kinds_that_say_so(pre, whole):
    vocabulary = tiny_vocabulary(pre)
    vocabulary["tokens"] = [*vocabulary["tokens"], "qzxqzx"]
    assert (opened(vocabulary).tokenize("qzxqzx") == ["qzxqzx"]) == whole


@pytest.mark.parametrize("token", ["<｜end▁of▁sentence｜>", "<|fin de phrase é|>"])
def test_special_tokens_beyond_ascii_keep_their_ids(token):
    """Such as DeepSeek's, which lie in a byte-level vocabulary as they are spelled."""
    vocabulary = tiny_vocabulary("deepseek-r1-qwen")
    vocabulary["tokens"] = [*vocabulary["tokens"], token]
    vocabulary["eos_token_id"] = last = len(vocabulary["tokens"]) - 1
    vocabulary["token_type"] = [*[1] * last, CONTROL]
    tokenizer = opened(vocabulary)
    assert tokenizer.eos_token_id == last and tokenizer(f"a{token}")["input_ids"][-1] == last
    assert len(tokenizer) == last + 1


def test_a_qwen_composes_accents():
    tokenizer = opened(tiny_vocabulary("qwen2"))
    assert tokenizer.tokenize("e\u0301") == tokenizer.tokenize("\u00e9")


def test_a_byte_level_vocabulary_gives_text_back():
    tokenizer = opened({**tiny_vocabulary("llama-bpe"), "eos_token_id": tiny_tokenizer().eos_token_id})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


REFUSED = {
    "another kind": ({**tiny_vocabulary(), "model": "t5"}, "tokenizer.ggml.model=t5"),
    "no scores": ({**sentencepiece(), "scores": None}, "no tokenizer.ggml.scores"),
    "merges of other tokens": ({**tiny_vocabulary(), "merges": ["\u4e00 \u4e01"]}, "does not hold together"),
    "kinds of fewer tokens": ({**tiny_vocabulary(), "token_type": [1]}, "does not hold together"),
    "an id beyond it": ({**tiny_vocabulary(), "eos_token_id": 99_999}, "99999 as its eos token"),
    "a token twice": ({**sentencepiece(), "tokens": ["<unk>"] * len(sentencepiece()["tokens"])}, "differ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_vocabulary_that_cannot_be_right_is_refused(name):
    vocabulary, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        opened({name: value for name, value in vocabulary.items() if value is not None})


def test_a_tokenizer_that_transformers_reads_as_another_is_refused(tmp_path):
    """It gives every model of type `qwen2` Qwen's own."""
    for vocabulary, said in ((tiny_vocabulary("llama-bpe"), "pre=llama-bpe"), (sentencepiece(), "ggml.model=llama")):
        model = made("qwen2", vocab_size=len(vocabulary["tokens"]))
        with pytest.raises(UserError, match=f"architecture=qwen2.*{said}.*reads Qwen2Tokenizer there"):
            checkpoint_of(written(model, tmp_path / "teacher.gguf", vocabulary=vocabulary))


def test_a_part_of_a_model_is_refused(tmp_path):
    file = written(made("llama"), tmp_path / "m-00001-of-00002.gguf", fields={"split.count": 2, "split.no": 0})
    with pytest.raises(UserError, match="one of 2 parts of a model: join them first"):
        checkpoint_of(file)
