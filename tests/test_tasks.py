"""Retrieval tasks: what they ask, how they are laid out, and that they are the same every time."""

import bisect
import itertools
import random
import re

import pytest
from conftest import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flashmorph.data.corpus import Corpus
from flashmorph.errors import UserError
from flashmorph.recipe.questions import open_questions
from flashmorph.recipe.recipe import load_recipe
from flashmorph.tasks import SPLITS, STYLES, TASKS, Haystack, Layout, TaskSettings, make_example, names
from flashmorph.tasks.haystack import REPEATED

SETTINGS = {
    "one_key": TaskSettings(task="many_keys", num_keys=1),
    "four_keys": TaskSettings(task="many_keys", num_keys=4, num_asked=3),
    "values": TaskSettings(task="many_values", num_values=3, num_keys=2),
    "hops": TaskSettings(task="hops", num_chains=3, num_hops=3, num_asked=2),
}
DOCUMENTS = [
    f"Line {line} of a text.\n\nIt is about nothing,\n  as {line * 7919 % 997} others are." for line in range(9)
]
LENGTH = 900


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A small BPE with a BOS token that its post-processor puts in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*DOCUMENTS, REPEATED], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"tiny": tiny_tokenizer(), "trained": trained_tokenizer()}


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.fixture(params=TOKENIZERS)
def layout(request, style) -> Layout:
    return Layout(TOKENIZERS[request.param], style, Haystack(DOCUMENTS))


@pytest.fixture(params=SETTINGS)
def settings(request) -> TaskSettings:
    return SETTINGS[request.param]


def runs(example) -> list[list[int]]:
    """The marked tokens, one list for each run of marks."""
    pairs = zip(example.is_answer, example.input_ids, strict=True)
    return [[token for _, token in group] for marked, group in itertools.groupby(pairs, lambda pair: pair[0]) if marked]


def problem_of(settings: TaskSettings, style, number: int = 0, split: str = "test"):
    return TASKS[settings.task](random.Random(number), style, names(split), **settings.settings)


def shortest(layout: Layout, problem) -> int:
    """The number of tokens that facts and questions take without any text around them."""

    def fits(length: int) -> bool:
        try:
            layout.lay_out(problem, length, random.Random(0))
        except UserError:
            return False
        return True

    return bisect.bisect_left(range(LENGTH), True, key=fits)


def test_a_row_has_exactly_the_length_asked_for(settings, layout, style):
    problem = problem_of(settings, style)
    least = shortest(layout, problem)
    for length in (least, least + 1, least + 13, LENGTH, LENGTH + 1):
        example = layout.lay_out(problem, length, random.Random(length))
        assert len(example.input_ids) == len(example.is_answer) == length


def test_the_marked_tokens_are_the_answers_and_nothing_else(settings, layout, style):
    for number in range(3):
        problem = problem_of(settings, style, number)
        example = layout.lay_out(problem, LENGTH, random.Random(number))
        marked = [layout._tokenizer.decode(tokens) for tokens in runs(example)]
        assert marked == [answer for _, answer in problem.questions]
        assert marked[-1] == example.answer


def test_the_prompt_is_a_prefix_that_ends_where_the_answer_begins(settings, layout, style):
    problem = problem_of(settings, style)
    example = layout.lay_out(problem, LENGTH, random.Random(0))
    prompt, rest = example.input_ids[: example.prompt_tokens], example.input_ids[example.prompt_tokens :]
    assert layout._tokenizer.decode(prompt).endswith(problem.questions[-1][0])
    assert layout._tokenizer.decode(rest) == problem.questions[-1][1]
    assert example.is_answer[example.prompt_tokens :] == [True] * len(rest)
    assert not example.is_answer[example.prompt_tokens - 1]


def test_the_text_holds_every_fact_in_order_then_the_questions(settings, layout, style):
    problem = problem_of(settings, style)
    example = layout.lay_out(problem, LENGTH, random.Random(0))
    text = layout._tokenizer.decode(example.input_ids, skip_special_tokens=True)
    asked = style.stop.join(prompt + answer for prompt, answer in problem.questions)
    assert text.endswith(asked)
    place = 0
    for fact in problem.facts:
        place = text.index(fact, place) + len(fact)
    assert place <= len(text) - len(asked)


def test_a_row_starts_as_the_tokenizer_starts_a_text(layout, style):
    example = layout.lay_out(problem_of(SETTINGS["one_key"], style), 200, random.Random(0))
    special = layout._tokenizer("").input_ids
    assert example.input_ids[: len(special)] == special
    assert not set(example.input_ids[len(special) :]) & set(layout._tokenizer.all_special_ids)


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_fact_stands_at_its_depth(layout, style, depth):
    problem = problem_of(SETTINGS["one_key"], style)
    example = layout.lay_out(problem, LENGTH, random.Random(0), depths=[depth])
    text = layout._tokenizer.decode(example.input_ids, skip_special_tokens=True)
    before, fact, _ = text.partition(problem.facts[0].strip())
    assert fact
    room = LENGTH - shortest(layout, problem)
    longest = max(len(layout.encode(line)) for text in DOCUMENTS for line in Haystack([text])._documents[0])
    # Line ends beside the fact may be joined with its own.
    assert depth * room - 2 <= len(layout.encode(before)) <= depth * room + longest + 2
    if depth == 0:
        assert not before


def test_several_facts_stand_at_their_depths(layout, style):
    problem = problem_of(SETTINGS["four_keys"], style)
    example = layout.lay_out(problem, LENGTH, random.Random(0), depths=[0, 0, 1, 1])
    text = layout._tokenizer.decode(example.input_ids, skip_special_tokens=True)
    assert text.startswith("".join(problem.facts[:2]))
    assert "".join(problem.facts[2:]) + problem.questions[0][0] in text
    assert not text.startswith("".join(problem.facts[:3]))


@pytest.mark.parametrize("depths", [[0.5], [0.1] * 5])
def test_a_wrong_number_of_depths_is_refused(layout, style, depths):
    with pytest.raises(UserError, match="4 facts"):
        layout.lay_out(problem_of(SETTINGS["four_keys"], style), LENGTH, random.Random(0), depths)


def test_a_length_that_is_too_short_is_refused_with_the_length_it_takes(settings, layout, style):
    problem = problem_of(settings, style)
    least = shortest(layout, problem)
    with pytest.raises(UserError, match=rf"at least {least} tokens; the context length is {least - 1}$"):
        layout.lay_out(problem, least - 1, random.Random(0))


def test_a_question_depends_on_seed_split_and_number_alone(settings, layout, style):
    def make(split="train", length=LENGTH, seed=1, number=5):
        return make_example(settings, layout, style, split, length, seed, number)

    several = [make(number=number) for number in range(7)]
    assert make() == several[5]
    assert len({tuple(example.input_ids) for example in several}) == len(several)
    for other in (make(split="test"), make(seed=2), make(number=6)):
        assert other.input_ids != several[5].input_ids
        assert other.answer != several[5].answer


def test_a_question_is_the_same_in_another_layout_of_the_same_text(settings, style):
    first, second = (Layout(TOKENIZERS["tiny"], style, Haystack(DOCUMENTS)) for _ in range(2))
    make_example(settings, first, style, "train", LENGTH, 0, 3)
    assert make_example(settings, first, style, "train", LENGTH, 0, 4) == make_example(
        settings, second, style, "train", LENGTH, 0, 4
    )


def test_no_name_belongs_to_two_splits():
    words = {split: names(split) for split in SPLITS}
    for split, other in itertools.combinations(SPLITS, 2):
        assert not set(words[split]) & set(words[other])
    assert all(len(set(words[split])) == len(words[split]) >= 16 for split in SPLITS)
    assert all(names(split) == words[split] for split in SPLITS)
    with pytest.raises(ValueError, match="train, validation, referee, test"):
        names("dev")


def test_a_name_stays_in_its_split_in_every_version_and_process():
    first = {"train": "get", "validation": "node", "referee": "not", "test": "frame"}
    assert {split: names(split)[0] for split in SPLITS} == first


def test_a_name_is_one_token_of_the_embedded_teacher():
    tokenizer = tiny_tokenizer()
    assert [word for split in SPLITS for word in names(split) if len(tokenizer(f" {word}").input_ids) != 1] == []


def test_keys_come_from_the_words_of_their_split(settings):
    style = STYLES["lines"]
    for split in SPLITS:
        for number in range(20):
            problem = problem_of(settings, style, number, split)
            text = " ".join([*problem.facts, *(prompt for prompt, _ in problem.questions)])
            assert set(re.findall(r"[a-z]+", text)) <= set(names(split))


def test_keys_of_one_problem_differ_and_values_do_not_start_with_zero(style):
    for number in range(50):
        problem = problem_of(TaskSettings(task="many_keys", num_keys=12, num_asked=12), style, number)
        assert len({prompt for prompt, _ in problem.questions}) == 12
        assert all(re.fullmatch(r" ?[1-9]\d{5}", answer) for _, answer in problem.questions)


def test_the_answer_is_what_the_facts_say(style):
    for number in range(20):
        problem = problem_of(SETTINGS["four_keys"], style, number)
        assert len(problem.facts) == 4 and len(problem.questions) == 3
        for prompt, answer in problem.questions:
            (fact,) = [fact for fact in problem.facts if answer.strip() in fact]
            key = next(key for key in key_pairs(fact) if style.question.format(key=key) == prompt)
            assert fact == style.fact.format(key=key, value=answer.strip())


def key_pairs(text: str) -> list[str]:
    words = re.findall(r"[a-z]+", text)
    return [" ".join(pair) for pair in itertools.pairwise(words)]


def test_several_values_are_answered_in_the_order_of_the_text(style):
    for number in range(20):
        problem = problem_of(SETTINGS["values"], style, number)
        ((prompt, answer),) = problem.questions
        key = next(key for key in key_pairs(prompt) if style.many_question.format(key=key) == prompt)
        found = [re.search(r"\d{6}", fact)[0] for fact in problem.facts if f" {key}" in fact]
        assert len(problem.facts) == 6 and len(found) == 3
        assert re.findall(r"\d{6}", answer) == found
        assert answer == style.separator.join(style.answer.format(value=value) for value in found)


def test_a_link_stands_after_its_target_and_several_chains_lead_to_values(style):
    """Following the links from each question must lead to its answer, past the other chains' roots."""
    orders = set()
    for number in range(30):
        problem = problem_of(SETTINGS["hops"], style, number)
        known: dict[str, str] = {}
        roots = 0
        for fact in problem.facts:
            words = [word for word in re.findall(r"[a-z]+", fact) if word in names("test")]
            if value := re.search(r"\d{6}", fact):
                roots += 1
                assert fact == style.fact.format(key=words[0], value=value[0])
                known[words[0]] = value[0]
            else:
                key, target = words
                assert fact == style.link.format(key=key, target=target)
                known[key] = known[target]
        assert roots == 3 and len(known) == len(problem.facts) == 9
        assert len(set(known.values())) == 3
        for prompt, answer in problem.questions:
            key = next(key for key in known if style.question.format(key=key) == prompt)
            assert answer == style.answer.format(value=known[key])
            assert not any(style.fact.format(key=key, value=known[key]) == fact for fact in problem.facts)
        orders.add(tuple(bool(re.search(r"\d{6}", fact)) for fact in problem.facts))
    assert len(orders) > 5


def test_chains_are_several_by_default():
    problem = problem_of(TaskSettings(task="hops"), STYLES["lines"])
    assert sum(bool(re.search(r"\d{6}", fact)) for fact in problem.facts) > 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"task": "many_key"}, "many_keys"),
        ({"task": "many_keys", "keys": 3}, "num_keys"),
        ({"task": "many_values", "num_asked": 2}, "num_values"),
        ({"task": "hops", "chains": 2}, "num_chains"),
        ({"task": "many_keys", "rng": 1}, "rng"),
        ({"task": "many_keys", "num_keys": "several"}, "num_keys"),
        ({"task": "hops", "num_hops": 2.5}, "num_hops"),
    ],
)
def test_an_unknown_task_or_setting_is_refused_with_what_there_is(settings, named):
    with pytest.raises(ValueError, match=named):
        TaskSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"task": "many_keys", "num_keys": 2, "num_asked": 3}, "between 1 and num_keys = 2"),
        ({"task": "many_keys", "num_keys": 0}, "num_keys = 0"),
        ({"task": "many_keys", "num_keys": 2, "num_asked": 0}, "got 0"),
        ({"task": "many_keys", "num_keys": 5_000}, "at most"),
        ({"task": "many_values", "num_values": 0}, "at least 1"),
        ({"task": "many_values", "num_keys": 0}, "at least 1"),
        ({"task": "hops", "num_hops": 1}, "at least 2"),
        ({"task": "hops", "num_chains": 2, "num_asked": 3}, "num_chains = 2"),
        ({"task": "hops", "num_chains": 100}, "fewer chains"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, problem):
    with pytest.raises(UserError, match=problem):
        problem_of(TaskSettings(**settings), STYLES["lines"])


def test_a_recipe_can_ask_for_the_repeated_haystack():
    recipe = load_recipe("demo", {"data.haystack": "repeated", "evaluate.questions": 1})
    questions = open_questions(recipe, Corpus(), tiny_tokenizer())
    text = tiny_tokenizer().decode(questions["one_key"][0].input_ids)
    assert text.count(REPEATED) > 5
    lines = {line for line in text.splitlines() if line[:1] not in ("@", "?")}
    assert all(line + "\n" == REPEATED or REPEATED.endswith(line + "\n") for line in lines)


def test_a_haystack_is_endless_and_made_of_its_documents():
    lines = list(itertools.islice(Haystack(["one\n\ntwo", "  \n"]).lines(random.Random(0)), 50))
    assert set(lines) == {"one\n", "\n", "two\n"}
    assert set(itertools.islice(Haystack.repeated().lines(random.Random(0)), 20)) == {REPEATED}
    for nothing in ([], ["", " \n"]):
        with pytest.raises(ValueError, match="not empty"):
            Haystack(nothing)
