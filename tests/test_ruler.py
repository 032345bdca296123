"""RULER's questions: they fit, they hold their answers, and they are the ones of lm-evaluation-harness."""

import random
import re
from collections import Counter

import pytest
from conftest import tiny_tokenizer

from flashmorph.errors import UserError
from flashmorph.tasks import Lines, Prompt, Ruler
from flashmorph.tasks.haystack import NOISE
from flashmorph.tasks.ruler import FORMS
from flashmorph.tasks.ruler.written import Material

SENTENCES = [f"Sentence {line} of a text says that {line * 7919 % 997} others are alike." for line in range(400)]
DOCUMENTS = ["\n".join(SENTENCES[start : start + 40]) for start in range(0, len(SENTENCES), 40)]
TOKENIZER = tiny_tokenizer()
LENGTH = 2048
UNITS = 40


@pytest.fixture(scope="module")
def ruler() -> Ruler:
    return Ruler(TOKENIZER, DOCUMENTS, seed=0)


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(DOCUMENTS)


def written(name: str, material: Material, units: int = UNITS, depth: float | None = None, seed: int = 0):
    form = FORMS[name]
    return form.write(random.Random(seed), material, units, depth, **form.settings_at(1024))


@pytest.mark.parametrize("name", FORMS)
def test_prompt_and_answer_fill_the_context_and_never_more(ruler, name):
    for number in range(4):
        prompt = ruler.prompt(name, LENGTH, number, None)
        used = len(prompt.input_ids) + prompt.answer_tokens
        assert 0.95 * LENGTH < used <= LENGTH
        assert prompt.answer_tokens == FORMS[name].answer_tokens


@pytest.mark.parametrize("name", FORMS)
def test_the_text_holds_what_is_asked_for_and_is_the_same_every_time(ruler, name):
    prompt = ruler.prompt(name, LENGTH, 3, 0.5)
    text = TOKENIZER.decode(prompt.input_ids)
    assert all(reference in text for reference in prompt.references)
    assert len(set(prompt.references)) == len(prompt.references)
    again = Ruler(TOKENIZER, DOCUMENTS, seed=0).prompt(name, LENGTH, 3, 0.5)
    assert again == prompt != Ruler(TOKENIZER, DOCUMENTS, seed=1).prompt(name, LENGTH, 3, 0.5)
    assert ruler.prompt(name, LENGTH, 4, 0.5) != prompt


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.has_depth])
def test_the_needle_stands_at_its_depth(ruler, name):
    shares = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        prompt = ruler.prompt(name, LENGTH, 0, depth)
        text = TOKENIZER.decode(prompt.input_ids)
        begin, end = text.index("\n") + 1, text.rindex("\nWhat is")
        shares.append((text.index(prompt.references[0]) - begin) / (end - begin))
    assert shares == sorted(shares)
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.1)


@pytest.mark.parametrize("style", [Ruler, Lines])
def test_what_does_not_fit_says_how_much_it_needs(style):
    asker = style(TOKENIZER, DOCUMENTS, seed=0)
    for name in asker.names:
        with pytest.raises(UserError, match=r"needs at least \d+ tokens.*the context length is 9"):
            asker.prompt(name, 9, 0, None)


@pytest.mark.parametrize("name", ["one_key", "sixteen_keys"])
def test_a_line_stands_at_its_depth_among_the_others(name):
    lines = Lines(TOKENIZER, DOCUMENTS, seed=0)
    for number, depth in enumerate((0.0, 0.3, 0.6, 1.0)):
        prompt = lines.prompt(name, 900, number, depth)
        text = TOKENIZER.decode(prompt.input_ids)
        assert text.count("@ ") == (1 if name == "one_key" else 16)
        assert text.index(prompt.references[0]) / text.rindex("? ") == pytest.approx(depth, abs=0.15)


def test_scores_are_rulers():
    both = Prompt([1], 5, ("Apple", "7123"), anywhere=True)
    assert [both.score(text) for text in ("pear", "an APPLE", "7123, apple")] == [0, 0.5, 1]
    exact = Prompt([1], 5, ("48213\n",))
    assert [exact.score(text) for text in ("48213\n?", "482139", " 48213\n")] == [1, 0, 0]


def test_words_are_as_frequent_as_rulers_definition_says(material):
    common = written("cwe", material)
    listed = re.findall(r"\d+\. (\S+(?: [a-z]\S*)*)", common.question.split("most often.\n")[-1].split("\nQuestion")[0])
    counts = Counter(listed)
    assert sorted(counts.values()) == [1] * (UNITS - 10) + [6] * 10
    assert {word for word, count in counts.items() if count == 6} == set(common.references)
    for units in range(27, 200):
        frequent = written("fwe", material, units)
        counts = Counter(frequent.question.split("coded words. ")[1].split("\nQuestion")[0].split())
        order = [word for word, _ in counts.most_common()]
        assert order[0] == "..." and set(order[1:4]) == set(frequent.references)
        assert len(counts) == 4 or counts[order[3]] > counts[order[4]]


# Everything below compares with lm-evaluation-harness, where it is installed with its extra `ruler`.


@pytest.fixture
def niah(monkeypatch, material):
    """lm_eval's generator and ours, keys and values replaced by their kinds."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("nltk").download = lambda *_, **__: False
    module = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah")
    drawn = iter(range(10**6))
    monkeypatch.setattr(module, "generate_random", lambda kind: f"<{kind}{next(drawn)}>")
    monkeypatch.setattr(module, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?]) ", text))
    monkeypatch.setattr(Material, "draw", lambda self, rng, kind: f"<{kind}{next(drawn)}>")
    monkeypatch.setattr(Material, "sentences", lambda self, rng, words: SENTENCES[:words])
    return module


def plain(text: str) -> str:
    """Without what is random."""
    text = re.sub(r"<(\w+?)\d+>", r"<\1>", text)
    return re.sub(r"\b\d{5}\b", "<value>", re.sub(r"\b[A-Z]{3,5}\b(?<!VAR)", "<name>", text))


def pieces(text: str) -> tuple[str, list[str], str]:
    """The instruction, the pieces of the context in any order, and the question."""
    head, _, rest = plain(text).partition("\n")
    context, _, tail = rest.rpartition("\n")
    # A needle at depth 0 leaves an empty piece in front of it.
    return head, sorted(filter(None, re.split(r"(?<=[.!?]) |\n", context.strip()))), tail


@pytest.mark.parametrize("name", [name for name in FORMS if name.startswith("niah")])
def test_needles_are_lm_evals(monkeypatch, material, niah, name):
    settings: dict = {}
    utils = pytest.importorskip("lm_eval.tasks.ruler.niah_utils")
    monkeypatch.setattr(utils, "get_tokenizer", lambda *_: None)
    monkeypatch.setattr(utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(utils, "generate_samples", lambda haystack, **given: settings.update(given) or [])
    monkeypatch.setattr(utils, "download_dataset", list)
    getattr(utils, name)(max_seq_lengths=[LENGTH])
    hay = SENTENCES if settings["type_haystack"] == "essay" else niah.get_haystack(settings["type_haystack"])
    queries = settings.get("num_needle_q", 1)
    text, answers, query = niah.generate_input_output(
        UNITS,
        hay,
        type_haystack=settings["type_haystack"],
        num_needle_k=max(settings.get("num_needle_k", 1), queries),
        type_needle_k=settings["type_needle_k"],
        num_needle_v=settings.get("num_needle_v", 1),
        type_needle_v=settings["type_needle_v"],
        template=settings["template"],
        num_needle_q=queries,
    )
    ours = written(name, material)
    assert pieces(ours.question) == pieces(text)
    assert [plain(reference) for reference in ours.references] == [plain(answer) for answer in answers]
    one = queries * settings.get("num_needle_v", 1) == 1
    kind = settings["type_needle_v"][:-1] if one else settings["type_needle_v"]
    prefix = f"The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
    assert plain(ours.prefix) == plain(prefix)


def test_variable_tracking_is_lm_evals(material):
    pytest.importorskip("lm_eval")
    theirs = pytest.importorskip("lm_eval.tasks.ruler.vt_utils")
    text, answers = theirs.generate_input_output(UNITS, num_chains=1, num_hops=4)
    ours = written("vt", material)
    start = ours.question.rindex("Memorize and track")
    assert ours.question[:start].startswith("Memorize and track") and ours.question[:start].endswith("\n\n")

    def sorted_lines(prompt: str) -> list[str]:
        return sorted(
            re.split(r"\n ?|(?<=\S) (?=VAR <name> =)|(?<=<name>)  ?(?=The)|(?<=<value>) (?=The)", plain(prompt))
        )

    assert sorted_lines(f"{ours.question[start:]} {ours.prefix}") == sorted_lines(text.strip())
    assert len(ours.references) == len(answers) == 5
    assert ours.question.count(NOISE) == UNITS + 6


def test_common_and_frequent_words_are_lm_evals(material):
    pytest.importorskip("lm_eval")
    cwe = pytest.importorskip("lm_eval.tasks.ruler.cwe_utils")
    fwe = pytest.importorskip("lm_eval.tasks.ruler.fwe_utils")
    assert set(material.words) == set(cwe.WORDS)

    def shape(text: str) -> list[str]:
        return re.sub(r"\d+\. .*(?=\nQuestion)", "<list>", text).splitlines()

    example, text, answer = cwe.generate_input_output(UNITS, 1024)
    ours = written("cwe", material)
    solved, _, asked = ours.question.partition("\nBelow")
    assert shape(f"Below{asked} {ours.prefix}") == shape(text)
    assert shape(solved)[:2] == shape(example)[:2] and len(re.findall(r"\d+\. ", solved)) == 50
    assert len(ours.references) == len(answer) == 10

    text, answer, _ = fwe.generate_input_output(1024, TOKENIZER, num_words=100, vocab_size=1024 // 50)
    ours = written("fwe", material, 100)
    head, coded = f"{ours.question} {ours.prefix}".split("coded words. ")
    their_head, their_coded = text.split("coded words. ")
    words, their_words = (part.partition("\nQuestion") for part in (coded, their_coded))
    assert (head, words[2]) == (their_head, their_words[2])
    assert sorted(Counter(words[0].split()).values()) == sorted(Counter(their_words[0].split()).values())
    assert len(ours.references) == len(answer) == 3
