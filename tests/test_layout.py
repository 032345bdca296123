"""Questions under every kind of tokenizer: what is marked, what is right, and where facts stand."""

import random
import re
import statistics

import pytest
from teacher_tokenizers import AROUND, CHAT, KINDS, TEXT, SlowTokenizer, teacher_tokenizer

from flashmorph.errors import UserError
from flashmorph.recipe.outlook import check
from flashmorph.recipe.recipe import load_recipe
from flashmorph.tasks import STYLES, Haystack, Layout, Lines, Ruler, TaskSettings, make_example, names
from flashmorph.tasks.many_keys import many_keys
from flashmorph.tasks.ruler import FORMS
from flashmorph.tasks.ruler.written import Material
from flashmorph.tokens.continuation import continuation
from flashmorph.tokens.special_tokens import before_text, end_tokens

ONE = TaskSettings.model_validate({"task": "many_keys", "num_keys": 1})
SEVERAL = TaskSettings.model_validate({"task": "many_keys", "num_keys": 3, "num_asked": 2})
VALUES = TaskSettings.model_validate({"task": "many_values", "num_values": 3})
LENGTH = 500
SLOW = "slow"


def tokenizer_of(kind: str, around: str = "bos", **settings):
    return SlowTokenizer(**settings) if kind == SLOW else teacher_tokenizer(kind, around, **settings)


@pytest.fixture(params=[*[(kind, around) for kind in KINDS for around in AROUND], (SLOW, "nothing")], ids=" + ".join)
def tokenizer(request):
    return tokenizer_of(*request.param)


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


def example_of(tokenizer, style, task=SEVERAL, number=0, length=LENGTH):
    return make_example(task, Layout(tokenizer, style, Haystack(TEXT)), style, "test", length, 0, number)


def natural(tokenizer, example, following: str) -> str:
    """What the tokens of the whole text read like behind the prompt, the text going on with `following`."""
    text, prompt = (
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in (example.input_ids, example.input_ids[: example.prompt_tokens])
    )
    ids = tokenizer(text + following, add_special_tokens=False).input_ids
    size = next(size for size in range(len(ids)) if tokenizer.decode(ids[:size]).lstrip() == prompt.lstrip())
    return continuation(tokenizer, ids[:size], ids[size:])


@pytest.mark.parametrize("task", [ONE, SEVERAL, VALUES])
def test_the_natural_continuation_is_right_and_a_longer_number_wrong(tokenizer, style, task):
    example = example_of(tokenizer, style, task)
    prompt = example.prompt
    made = example.input_ids[example.prompt_tokens :]
    for following, right in ((style.stop, 1), (f"{style.stop}More text", 1), ("0" + style.stop, 0), ("", 0)):
        assert prompt.score(natural(tokenizer, example, following)) == right
    own = continuation(tokenizer, prompt.input_ids, made)
    assert prompt.score(own) == 0 and prompt.score(own, ended=True) == 1
    assert prompt.score(own + "0", ended=True) == prompt.score(own[:-1], ended=True) == 0


def test_the_marked_tokens_are_those_that_reach_into_an_answer(tokenizer, style):
    example = example_of(tokenizer, style)
    start = before_text(tokenizer)
    ids = example.input_ids[len(start) :]
    assert example.input_ids[: len(start)] == start and not set(ids) & set(tokenizer.all_special_ids) - {0}
    assert example.is_answer[-1] and not example.is_answer[example.prompt_tokens - 1]
    # The last answer's tokens, and no shorter end of the row, hold the whole answer.
    inside = tokenizer.decode(example.input_ids[example.prompt_tokens :])
    assert inside.endswith(example.answer.strip()) and len(inside) <= len(example.answer) + 6
    without_first = continuation(tokenizer, example.input_ids[:-40], example.input_ids[-40:])
    reach = continuation(
        tokenizer, example.input_ids[: example.prompt_tokens + 1], example.input_ids[example.prompt_tokens + 1 :]
    )
    assert without_first.endswith(example.answer) and len(reach) < len(example.answer)
    runs = sum(
        mark and not before for before, mark in zip([False, *example.is_answer], example.is_answer, strict=False)
    )
    assert runs == 2


def test_a_row_is_the_tokens_of_its_text(tokenizer, style):
    """Apart from the cut at the beginning, no token differs from those of the text in one go: no stray space."""
    example = example_of(tokenizer, style)
    text = tokenizer.decode(example.input_ids, skip_special_tokens=True)
    again = tokenizer(text, add_special_tokens=False).input_ids
    assert again[-300:] == example.input_ids[-300:]


@pytest.mark.parametrize("kind", [*KINDS, SLOW])
def test_every_length_is_met_however_little_room_there_is(kind, style):
    tokenizer = tokenizer_of(kind)
    layout, problem = Layout(tokenizer, style, Haystack(TEXT)), many_keys(random.Random(0), style, names("test"), 3, 2)
    with pytest.raises(UserError) as refusal:
        layout.lay_out(problem, 20, random.Random(0))
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    for length in range(least, least + 25, 2):
        example = layout.lay_out(problem, length, random.Random(length))
        assert len(example.input_ids) == len(example.is_answer) == length
        text = " ".join(tokenizer.decode(example.input_ids).split())
        assert all(fact.strip() in text for fact in problem.facts)
        assert text.endswith(" ".join("".join(problem.questions[-1]).split()))


def test_special_tokens_around_a_text(tokenizer):
    whole = tokenizer("Line 7").input_ids
    start, ends = before_text(tokenizer), end_tokens(tokenizer)
    assert whole[: len(start)] == start == [1] * (whole[0] == 1)
    assert ends == [2]


LONG = {
    "sentences": " ".join(f"Sentence {line} says that {line * 7919 % 997} others are alike." for line in range(3000)),
    "no sentences": " ".join(f"word{line * 7919 % 997}" for line in range(9000)),
    "no spaces": "".join(f"{line * 7919 % 997}x" for line in range(12000)),
    "carriage returns": "\r\n".join(f"Line {line} of {line * 7919 % 997}." for line in range(4000)),
    "form feeds": "\f".join(f"Line {line} of {line * 7919 % 997}." for line in range(4000)),
    "both": "A short line.\n" + " ".join(f"word{line * 7919 % 997}" for line in range(9000)) + "\nA short end.\n",
}


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", SLOW])
@pytest.mark.parametrize("text", LONG)
def test_facts_stand_at_their_depths_in_documents_of_one_line(kind, text):
    tokenizer, style, length = tokenizer_of(kind), STYLES["lines"], 800
    layout, misses = Layout(tokenizer, style, Haystack([LONG[text]] * 2)), []
    for number in range(21):
        depth = number / 20
        rng = random.Random(number)
        example = layout.lay_out(many_keys(rng, style, names("test"), num_keys=1), length, rng, [depth])
        whole = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        hay = whole[: whole.rindex("?")]
        fact = hay.index("@")
        assert fact == 0 or hay[fact - 1] == "\n"
        before, size = (len(tokenizer(part, add_special_tokens=False).input_ids) for part in (hay[:fact], hay))
        misses.append(abs(before / size - depth * (size - 20) / size))
    assert statistics.median(misses) <= 0.05 and max(misses) <= 0.12


@pytest.mark.parametrize("text", ["sentences", "no sentences", "no spaces"])
def test_long_lines_are_broken_where_it_hurts_least(text):
    tokenizer = teacher_tokenizer("byte level")
    layout = Layout(tokenizer, STYLES["lines"], Haystack([LONG[text]]))
    example = layout.plain(2000, random.Random(0))
    lines = tokenizer.decode(example.input_ids).split("\n")[1:-1]
    assert max(len(tokenizer(line).input_ids) for line in lines) <= 2000 // 20 and len(lines) < 60
    joint = "" if text == "no spaces" else " "
    assert joint.join(lines) in LONG[text] + joint + LONG[text]
    if text == "sentences":
        assert all(line.endswith(".") for line in lines)


def test_lines_that_are_short_enough_stay_as_they_are():
    document = "".join(f"Line {line} of a text.\n" for line in range(200))
    tokenizer = teacher_tokenizer("byte level")
    example = Layout(tokenizer, STYLES["lines"], Haystack([document])).plain(1000, random.Random(0))
    lines = tokenizer.decode(example.input_ids).splitlines()[1:-1]
    assert set(lines) <= set(document.splitlines())


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.settings.get("haystack") == "text"])
def test_rulers_needles_stand_at_their_depths_in_any_text(text, name):
    material, form = Material([LONG[text]]), FORMS[name]
    for depth in (0, 0.3, 0.5, 0.8, 1) if form.has_depth else ():
        settings = form.settings_at(2048)
        question = form.write(random.Random(1), material, 600, depth, **settings)
        context = question.question.split("afterwards.\n")[1].rsplit("\nWhat", 1)[0]
        assert context.index(question.references[0]) / len(context) == pytest.approx(depth, abs=0.12)
        assert len(material.sentences(random.Random(0), 600)) >= 20


def test_rulers_prompts_end_with_their_text():
    for around in AROUND:
        tokenizer = teacher_tokenizer("sentencepiece", around)
        prompt = Ruler(tokenizer, list(LONG.values()), 0).prompt("niah_single_2", 900, 0, 0.5)
        assert tokenizer.decode(prompt.input_ids).endswith("provided text is")
        assert prompt.input_ids[:1] == before_text(tokenizer) or not before_text(tokenizer)


@pytest.mark.parametrize("kind", [*KINDS, SLOW])
@pytest.mark.parametrize("task", [ONE, SEVERAL])
def test_through_the_chat_template_questions_are_the_users_and_answers_the_assistants(kind, style, task):
    tokenizer = tokenizer_of(kind, chat_template=CHAT)
    layout = Layout(tokenizer, style, Haystack(TEXT), chat_template=True)
    example = make_example(task, layout, style, "test", 700, 0, 0)
    assert len(example.input_ids) == 700
    text = tokenizer.decode(example.input_ids)
    opening = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).partition("x")[0]
    assert tokenizer.decode(tokenizer(opening, add_special_tokens=False).input_ids).strip() in text
    assert example.input_ids[0] == 1 and example.input_ids.count(1) == 1
    asked = 2 if task is SEVERAL else 1
    assert example.input_ids.count(2) == 2 * asked - 1
    last = text.split("assistant|>")[-1].strip()
    reply = re.escape(style.split(style.question)[1]).replace(r"\{key\}", r"\w+ \w+")
    assert re.fullmatch((reply + example.answer).strip(), last)
    assert "Answer:" not in text.split("assistant|>")[0]
    prompt = example.prompt
    made = continuation(tokenizer, prompt.input_ids, example.input_ids[example.prompt_tokens :])
    assert prompt.score(made, ended=True) == 1 and prompt.score(made) == 0


def test_the_grid_can_ask_through_the_template():
    tokenizer = teacher_tokenizer("byte level", chat_template=CHAT)
    for asker in (Ruler, Lines):
        prompt = asker(tokenizer, TEXT, 0, True).prompt(asker(tokenizer, TEXT, 0).names[1], 900, 0, 0.5)
        text = tokenizer.decode(prompt.input_ids)
        assert text.startswith("<s><|user|>\n") and text.count("<s>") == 1 and text.count("<|assistant|>") == 1
        assert len(prompt.input_ids) + prompt.answer_tokens <= 902


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_ask_is_refused_in_one_sentence(template):
    tokenizer = teacher_tokenizer("byte level", chat_template=template)
    with pytest.raises(UserError, match="chat template"):
        Layout(tokenizer, STYLES["prose"], Haystack(TEXT), chat_template=True)
    with pytest.raises(UserError, match="chat template"):
        Ruler(tokenizer, TEXT, 0, chat_template=True)


@pytest.mark.parametrize("setting", ["evaluate.chat_template", "chat_template"])
def test_a_recipe_that_asks_through_a_template_needs_one(teacher_folder, recipe_file, setting):
    from flashmorph.convert.teacher import open_teacher

    with pytest.raises(UserError, match="its tokenizer has none"):
        check(open_teacher(str(teacher_folder)), load_recipe(recipe_file, {setting: True}))
