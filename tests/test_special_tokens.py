"""Every separately attended piece of text begins with the tokenizer's special tokens, in rows and in held-out text."""

import json
from itertools import product

import pytest
import torch
from conftest import random_qwen3
from test_corpus import write_jsonl
from test_rows import TEMPLATE, talk
from tokenizers_of_all_kinds import BEFORE, KINDS, make_tokenizer

from flashmorph.data.corpus import Corpus, Mixture
from flashmorph.data.formats import split_of
from flashmorph.data.heldout import HeldOut, hold_out
from flashmorph.data.rows import pack
from flashmorph.errors import UserError
from flashmorph.losses import Head
from flashmorph.stages import collate
from flashmorph.stages.distill import DistillationLoss
from flashmorph.stages.extend import NextTokenLoss

LENGTH = 24
SHORT = [f"Document {number} says: a word and {number * number}.\n" for number in range(80)]
LONG = ["Document says: " + " ".join(f"word {number * place}" for number in range(150)) for place in range(1, 24)]
TEXTS = {"many short": SHORT, "few long": LONG, "both": SHORT + LONG}
TOKENIZERS = [pytest.param(*each, id=" ".join(each)) for each in product(KINDS, BEFORE)]


def special_of(tokenizer, template: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(BEFORE[template])


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def corpus_of(folder, texts: str) -> Corpus:
    return Corpus(str(write_jsonl(folder / f"{texts}.jsonl", TEXTS[texts])))


def trained_on(texts: str) -> list[str]:
    return [text for text in TEXTS[texts] if split_of(text) == "train"]


def packed(corpus, tokenizer, folder, rows: int = 20, length: int = LENGTH, name: str = "rows", **more):
    found = pack(corpus, tokenizer, "train", length, rows, 0, folder / f"{name}.npy", None, **more)
    return [found[row] for row in range(rows)]


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize(("kind", "template"), TOKENIZERS)
def test_each_document_and_each_rest_of_one_begins_with_the_special_tokens(tmp_path, kind, template, texts):
    """What is left without the inserted tokens are the documents end to end, as the tokenizer alone cuts them."""
    tokenizer = make_tokenizer(kind, template)
    corpus, before = Corpus(str(write_jsonl(tmp_path / "texts.jsonl", TEXTS[texts]))), special_of(tokenizer, template)
    expected, begins = [], []
    for text in corpus.documents("train", 0):
        begins.append(len(expected))
        expected += [*before, *encoded(tokenizer, text), tokenizer.eos_token_id]
    found: list[int] = []
    for row in packed(corpus, tokenizer, tmp_path):
        ids, starts = row["input_ids"], row["starts"]
        assert len(ids) == LENGTH
        assert all(ids[start : start + len(before)] == before[: LENGTH - start] for start in starts)
        # The special tokens of a document may begin at the end of the row before: all of them come again, once.
        found += next((before[len(found) - each :] for each in begins if 0 < len(found) - each < len(before)), [])
        is_rest = len(found) not in begins and bool(before)
        own = len(before) if is_rest else 0
        # What nothing before it announces is not learnt, and neither are special tokens.
        special = {start + place for start in starts for place in range(len(before)) if start + place < LENGTH}
        assert set(row["ignored"]) - {own} == special - {own} and (own in row["ignored"]) == bool(own or own in special)
        assert [start for start in starts if start] == [
            begin - len(found) + own for begin in begins if len(found) < begin < len(found) + LENGTH - own
        ]
        found += ids[own:]
    assert found == expected[: len(found)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_tokenizer_without_special_tokens_are_the_documents_end_to_end(tmp_path, kind):
    tokenizer = make_tokenizer(kind)
    corpus = Corpus(str(write_jsonl(tmp_path / "texts.jsonl", SHORT)))
    rows = packed(corpus, tokenizer, tmp_path)
    expected = [
        token for text in corpus.documents("train", 0) for token in [*encoded(tokenizer, text), tokenizer.eos_token_id]
    ]
    assert sum((row["input_ids"] for row in rows), []) == expected[: 20 * LENGTH]
    assert not any(row["ignored"] for row in rows)


@pytest.mark.parametrize("written", ["", "<s>"], ids=["no BOS in the template", "BOS in the template"])
@pytest.mark.parametrize("template", ["none", "before"])
def test_conversations_have_their_templates_tokens_and_never_a_second_bos(tmp_path, template, written):
    tokenizer = make_tokenizer("byte-level", template)
    tokenizer.chat_template = written + TEMPLATE
    talks = [talk(number) for number in range(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in talks))
    corpus, before = Corpus(str(tmp_path / "talks.jsonl")), special_of(tokenizer, template)
    known = [tokenizer.apply_chat_template(each, tokenize=False) for each in talks]
    expected = {tuple(encoded(tokenizer, text)) for text in known}
    length, first = 150, tokenizer.bos_token_id
    for row in packed(corpus, tokenizer, tmp_path, 10, length):
        ids, edges = row["input_ids"], [*row["starts"], length]
        for start, end in zip(edges[1:], edges[2:], strict=False):
            if end < length:
                assert tuple(ids[start:end]) in expected
        assert all(one != first or other != first for one, other in zip(ids, ids[1:], strict=False))
    found = hold_out(corpus, tokenizer, "train", 10_000, 10_000, 0)
    assert {tuple(piece) for piece in found.pieces} <= expected
    windows = hold_out(corpus, tokenizer, "train", 20, 2_000, 0)
    rests = [piece for piece, last in zip(windows.pieces[1:], windows.documents, strict=False) if piece[: len(before)]]
    assert all(piece[: len(before)] == before or piece[0] == encoded(tokenizer, known[0])[0] for piece in rests)


def test_shares_and_budgets_do_not_count_what_is_inserted(tmp_path):
    tokenizer = make_tokenizer("sentencepiece", "before")
    one, other = (corpus_of(tmp_path, name) for name in ("few long", "many short"))
    rows = packed(Mixture((one, other), (0.7, 0.3)), tokenizer, tmp_path, 60, 64)
    own = {bytes(str(encoded(tokenizer, text)), "ascii") for text in SHORT}
    documents, current = [], []
    for row in rows:
        for place, token in enumerate(row["input_ids"]):
            if token == tokenizer.bos_token_id and place:
                documents.append(current)
                current = []
            elif token != tokenizer.bos_token_id:
                current.append(token)
    sizes = [(len(each) + 1, bytes(str(each[:-1]), "ascii") in own) for each in documents]
    assert sum(size for size, short in sizes if short) / sum(size for size, _ in sizes) == pytest.approx(0.3, abs=0.05)
    with pytest.raises(UserError, match="2 tokens have no room for text behind the tokenizer's 2 special tokens"):
        packed(one, make_tokenizer("byte-level", "two before"), tmp_path, length=2, name="no room")


@pytest.mark.parametrize("isolate", [True, False], ids=["apart", "joined"])
def test_special_tokens_are_no_targets(tmp_path, isolate):
    """The loss of a row is that over its text, whatever the special tokens would be predicted as."""
    tokenizer = make_tokenizer("byte-level", "before")
    corpus = Corpus(str(write_jsonl(tmp_path / "texts.jsonl", SHORT)))
    model = random_qwen3(vocab_size=len(tokenizer))
    batch = collate(packed(corpus, tokenizer, tmp_path, 4), isolate)
    before = NextTokenLoss(model)(**batch)["loss"].item()
    kl = DistillationLoss(model, model)(**batch)["loss"].item()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.bos_token_id] = 0
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.isfinite().all() and kl == pytest.approx(0, abs=1e-6) and before > 0
    labels = torch.cat([each.next_tokens()[1] for each in _apart(batch)])
    assert tokenizer.bos_token_id not in labels.tolist() and tokenizer.eos_token_id in labels.tolist()


def _apart(batch):
    from flashmorph.data.isolation import apart, cut

    starts, mask = batch.get("starts"), batch["loss_mask"]
    return apart(batch["input_ids"], None, False, mask) if starts is None else cut(batch["input_ids"], starts, mask)


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize(("kind", "template"), TOKENIZERS)
def test_held_out_text_is_each_document_once_in_windows_with_special_tokens(tmp_path, kind, template, texts):
    tokenizer = make_tokenizer(kind, template)
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS[texts] + TEXTS[texts][:7])
    before = special_of(tokenizer, template)
    found = hold_out(Corpus(str(path)), tokenizer, "train", LENGTH, 10**6, 0)
    documents: dict[int, list[int]] = {}
    for number, piece, special in zip(found.documents, found.pieces, found.special, strict=True):
        assert piece[:special] == before and special == len(before) and len(piece) <= LENGTH
        documents.setdefault(number, []).extend(piece[special:])
    expected = [[*encoded(tokenizer, text), tokenizer.eos_token_id] for text in trained_on(texts)]
    if before:
        assert sorted(documents.values()) == sorted(expected) and found.tokens == sum(map(len, expected))
        assert found.offsets[-1] == found.tokens
    else:
        # A window of one token has nothing to predict.
        assert sum(map(len, expected)) - len(expected) <= found.tokens <= sum(map(len, expected))
        assert found.offsets[-1] == found.tokens - len(found.pieces)
    some = hold_out(Corpus(str(path)), tokenizer, "train", LENGTH, 100, 0)
    assert some.wanted == 100 and 100 - LENGTH <= some.tokens <= 100
    some.save(tmp_path / "text.npz")
    assert HeldOut.load(tmp_path / "text.npz") == some


@pytest.mark.parametrize(("kind", "template"), TOKENIZERS)
def test_held_out_text_of_long_documents_is_full_pieces_of_theirs(tmp_path, kind, template):
    tokenizer = make_tokenizer(kind, template)
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS["both"])
    every = hold_out(Corpus(str(path)), tokenizer, "train", LENGTH, 10**6, 0)
    long = hold_out(Corpus(str(path)), tokenizer, "train", LENGTH, 10**6, 0, long_documents=True)
    full = [piece for piece in every.pieces if len(piece) == LENGTH]
    assert sorted(long.pieces) == sorted(full) and 0 < len(full) < len(every.pieces)
    with pytest.raises(UserError, match="no document of 4,000 tokens or more in the split 'train'"):
        hold_out(Corpus(str(path)), tokenizer, "train", 4_000, 10**6, 0, long_documents=True)


@torch.no_grad()
@pytest.mark.parametrize("template", ["none", "two before"])
def test_losses_of_held_out_text_are_those_of_each_piece_alone(tmp_path, template):
    from flashmorph.evaluation import text_losses

    tokenizer = make_tokenizer("sentencepiece", template)
    text = hold_out(Corpus(str(write_jsonl(tmp_path / "texts.jsonl", TEXTS["both"]))), tokenizer, "train", 40, 1_500, 0)
    model = random_qwen3(vocab_size=len(tokenizer))
    expected = []
    for piece, first in zip(text.pieces, text.firsts, strict=True):
        logits = model(input_ids=torch.tensor([piece])).logits[0, first - 1 : -1]
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(piece[first:]), reduction="none").tolist()
    for batch_tokens in (1, 100, 10_000):
        assert text_losses(model, text, batch_tokens) == pytest.approx(expected, abs=1e-4)
    batches = text.in_batches(100)
    assert sorted(number for batch in batches for number in batch) == list(range(len(text.pieces)))
    for batch in batches:
        sizes = [len(text.pieces[number]) for number in batch]
        assert max(sizes) * len(sizes) <= 100 and 2 * min(sizes) >= max(sizes)
    parts = [text.batch(batch, model.device) for batch in batches]
    run = [part.losses(model.model(part.ids).last_hidden_state, Head.of(model)).sum().item() for part in parts]
    assert sum(run) == pytest.approx(sum(expected), rel=1e-5)


def test_a_mixture_holds_out_its_shares_and_then_what_is_left(tmp_path):
    tokenizer = make_tokenizer("byte-level", "before")
    one, other = (corpus_of(tmp_path, name) for name in ("few long", "many short"))
    sizes = {name: sum(len(encoded(tokenizer, text)) + 1 for text in trained_on(name)) for name in TEXTS}
    every = hold_out(Mixture((one, other), (0.1, 0.9)), tokenizer, "train", 4_000, 10**6, 0)
    assert every.tokens == sizes["few long"] + sizes["many short"]
    some = hold_out(Mixture((one, other), (0.5, 0.5)), tokenizer, "train", 4_000, 2 * sizes["many short"], 0)
    long = sum(len(piece) for piece in some.pieces if len(piece) > 100)
    assert long / some.tokens == pytest.approx(0.5, abs=0.25)


def test_text_of_which_nothing_can_be_predicted_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [text for text in SHORT if split_of(text) == "train"])
    with pytest.raises(UserError, match="no text for the split 'test'"):
        hold_out(Corpus(str(path)), make_tokenizer("byte-level"), "test", LENGTH, 100, 0)
    with pytest.raises(UserError, match="no room for text behind the tokenizer's 2 special tokens"):
        hold_out(Corpus(str(path)), make_tokenizer("byte-level", "two before"), "train", 2, 100, 0)
