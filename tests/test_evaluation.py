"""Evaluation: intervals, generation in batches, the recall grid, perplexity by position, models side by side."""

import json
import re
from dataclasses import asdict
from io import StringIO

import numpy as np
import pytest
import torch
from conftest import random_qwen3, run_command, tiny_tokenizer
from rich.console import Console
from scipy.stats import binomtest
from test_cli import broken_copy, refused

from flashmorph.cli.evaluate_tables import show_figures
from flashmorph.data.corpus import Corpus
from flashmorph.data.heldout import HeldOut
from flashmorph.errors import UserError
from flashmorph.evaluation import (
    Grid,
    GridRow,
    GridSettings,
    RangeLosses,
    Score,
    answer_scores,
    ask_grid,
    make_questions,
    paired_interval,
    paired_share_interval,
    perplexity_ratio,
    ratio_interval,
    share_interval,
)
from flashmorph.evaluation.classes import (
    CLOSING,
    CONTENT,
    DIGITS,
    FUNCTION,
    OPENING,
    SPACE,
    SYMBOLS,
    kinds,
    pieces_of,
    repeats,
)
from flashmorph.evaluation.tokens import TokenClasses
from flashmorph.tasks import Lines, Prompt

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return random_qwen3(vocab_size=len(TOKENIZER))


def test_wilsons_interval_is_scipys_and_takes_parts_of_hits():
    for hits, count in ((0, 7), (3, 7), (7, 7), (150, 200)):
        expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert share_interval([1] * hits + [0] * (count - hits)) == pytest.approx((expected.low, expected.high))
    parts = [0.25, 0.5, 0.75] * 20
    low, high = paired_interval([parts], [[0.0] * len(parts)])
    wide = share_interval(parts)
    assert wide[0] < low < 0.5 < high < wide[1]


@pytest.mark.parametrize("lost, questions", [(0.04, 25), (0.01, 100), (0.2, 25), (0.0, 25)])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_paired_interval_covers_a_loss_near_the_ceiling(lost, questions, groups):
    """Where two models answer everything there still is a width; the nominal coverage is 95 %."""
    rng = np.random.default_rng(0)
    right, covered = [[1.0] * questions] * groups, 0
    for _ in range(400):
        answered = (rng.random((groups, questions)) >= lost).astype(float).tolist()
        low, high = paired_share_interval(answered, right)
        covered += low <= -lost <= high
    assert covered >= 0.9 * 400
    low, high = paired_share_interval(right, right)
    assert low == -high and 1 < high * groups * questions < 4


def test_a_paired_interval_of_many_is_that_of_the_normal_distribution():
    rng = np.random.default_rng(1)
    one, other = (rng.random((2, 4000)) < [[0.7], [0.6]]).astype(float)
    low, high = paired_share_interval([one.tolist()], [other.tolist()])
    assert (low + high) / 2 == pytest.approx((one - other).mean(), abs=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * (one - other).std() / np.sqrt(4000), rel=0.01)


def test_an_interval_over_rows_covers_the_ratio():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        counts = rng.integers(0, 9, size=40)
        sums = counts * 0.3 + rng.normal(size=40) * counts
        low, high = ratio_interval(sums, counts)
        hits += low <= 0.3 <= high
    assert hits >= 50


def test_batches_and_padding_change_no_answer(model):
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 30, 17, 5, 26)
    rows = [torch.randint(len(TOKENIZER), (length,), generator=generator).tolist() for length in lengths]
    made = []
    for ids in rows:
        out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        made.append(TOKENIZER.decode(out[0, len(ids) :], skip_special_tokens=True))
    prompts = [Prompt(ids, 6, (text, "never said"), anywhere=True) for ids, text in zip(rows, made, strict=True)]
    for batch_tokens in (1, 60, 10_000):
        assert answer_scores(model, TOKENIZER, prompts, batch_tokens) == [0.5] * len(rows)


def test_long_prompts_run_few_at_once_whatever_the_tokens(model, monkeypatch):
    """A padded batch has masks of all pairs of tokens: what their number takes grows with the square of the length."""
    sizes: list[int] = []
    monkeypatch.setattr("flashmorph.evaluation.recall._MOST_MASKED", 3 * 40**2)

    def answer(model, tokenizer, config, batch) -> list[float]:
        sizes.append(len(batch))
        return [1.0] * len(batch)

    monkeypatch.setattr("flashmorph.evaluation.recall._answer_batch", answer)
    for length, expected in ((40, [3, 3, 1]), (20, [7]), (80, [1] * 7)):
        prompts = [Prompt([5] * length, 1, ("a",))] * 7
        assert answer_scores(model, TOKENIZER, prompts, 10**6) == [1.0] * 7
        assert sizes == expected
        sizes.clear()


def test_a_continuation_ends_when_nothing_is_left_to_find(model):
    steps = []
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    prompt = Prompt([5, 6, 7], 40, ("",), anywhere=True)
    assert answer_scores(model, TOKENIZER, [prompt]) == [1.0]
    handle.remove()
    assert len(steps) == 1


def test_the_grid_asks_every_depth_equally_often(model):
    settings = GridSettings(lengths=(64, 400), depths=4, questions=8, style="lines")
    assert settings.depth_values == pytest.approx([0, 1 / 3, 2 / 3, 1])
    asker = Lines(TOKENIZER, Corpus().pool("test", 0, 100_000), seed=0)
    grid = ask_grid(model, TOKENIZER, make_questions(asker, settings))
    rows = {(row.task, row.length): row for row in grid.rows}
    assert len(rows[("one_key", 64)].scores) == 8 and not rows[("two_hops", 400)].depths
    assert ("sixteen_keys", 64) not in rows and any("sixteen_keys at 64" in text for text in grid.left_out)
    figures = grid.to_dict()
    one_key = next(row for row in figures["rows"] if (row["task"], row["length"]) == ("one_key", 400))
    assert [cell["questions"] for cell in one_key["depths"]] == [2] * 4


def test_chosen_tasks_of_a_grid_ask_what_the_whole_grid_asks():
    asker = Lines(TOKENIZER, Corpus().pool("test", 0, 100_000), seed=0)
    whole = GridSettings(lengths=(128,), depths=2, questions=4, style="lines")
    some = whole.model_copy(update={"tasks": ("two_hops", "one_key")})
    chosen, everything = make_questions(asker, some), make_questions(asker, whole)
    assert list(chosen.prompts) == [("one_key", 128), ("two_hops", 128)]  # In the style's own order.
    assert all(list(prompts) == list(everything.prompts[about]) for about, prompts in chosen.prompts.items())
    with pytest.raises(UserError, match="unknown task of the style lines 'one_kez'; did you mean 'one_key'"):
        make_questions(asker, whole.model_copy(update={"tasks": ("one_kez",)}))


class _Counted:
    """Questions of `many` and `few`, of whose later ones one is too long; it counts what it makes."""

    names = ("many", "few")
    made = 0

    def has_depth(self, name: str) -> bool:
        return False

    def prompt(self, name: str, length: int, number: int, depth: float | None) -> Prompt:
        self.made += 1
        if (name, number) == ("few", 3):
            raise UserError("too long")
        return Prompt([5] * length, 1, ("a",))


def test_a_grid_makes_each_question_as_it_is_asked(model, monkeypatch):
    """Two hundred questions of a long context fill gigabytes."""
    asker, ahead = _Counted(), []
    settings = GridSettings(lengths=(8, 16), depths=1, questions=50, batch_tokens=32)
    questions = make_questions(asker, settings)
    before, answered = asker.made, 0

    def answer(model, tokenizer, config, batch) -> list[float]:
        nonlocal answered
        answered += len(batch)
        ahead.append(asker.made - before - answered)
        return [1.0] * len(batch)

    monkeypatch.setattr("flashmorph.evaluation.recall._answer_batch", answer)
    grid = ask_grid(model, TOKENIZER, questions)
    assert before == 4 and max(ahead[:37]) <= 1  # 13 batches of four and 25 of two are the task that fits.
    assert {row.task: len(row.scores) for row in grid.rows} == {"many": 50}
    assert grid.left_out == ["few at 8: too long", "few at 16: too long"]


def test_grids_are_compared_row_by_row_and_the_worst_cells_are_named():
    places = (0.0, 1.0)
    first = Grid([GridRow("a", 8, places, [1, 1] * 10), GridRow("b", 8, (), [1.0] * 20)])
    second = Grid([GridRow("a", 8, places, [1, 0] * 10), GridRow("b", 8, (), [0.5] * 20), GridRow("c", 9, (), [0])])
    minus = second.minus(first)
    assert minus["difference"] == pytest.approx(-0.5) and len(minus["rows"]) == 2
    narrow, wide = minus["rows"][1]["interval"], minus["rows"][0]["interval"]
    assert wide[0] < narrow[0] < -0.5 < narrow[1] < wide[1]
    assert minus["rows"][0]["interval"][0] < -0.5 < minus["rows"][0]["interval"][1] < 0
    worst = second.worst(first)
    assert [(cell["task"], cell["depth"]) for cell in worst[:2]] == [("a", 1.0), ("b", None)]
    assert first.worst() == [] and second.minus(second)["difference"] == 0


def text_of(sizes: list[int], length: int = 200, special: int = 0) -> HeldOut:
    """Documents of so many tokens, in windows of `length`."""
    cut = [(number, min(length, size - start)) for number, size in enumerate(sizes) for start in range(0, size, length)]
    pieces = [list(range(5, 5 + size)) for _, size in cut]
    return HeldOut(pieces, [number for number, _ in cut], [special] * len(cut), length, sum(sizes))


@pytest.mark.parametrize("special", [0, 2])
def test_perplexity_by_position_adds_up_to_the_whole(special):
    text = text_of([200] * 24 + [500, 40, 7], special=special)
    losses = np.random.default_rng(0).random(text.offsets[-1]) * 3
    found = RangeLosses.of(losses, text)
    assert found.perplexity["perplexity"] == pytest.approx(np.exp(losses.mean()))
    parts = found.by_position
    assert [(part["from"], part["to"]) for part in parts] == [(1, 31), (32, 63), (64, 127), (128, 199)]
    assert sum(part["tokens"] for part in parts) == len(losses)
    whole = sum(part["tokens"] * np.log(part["perplexity"]) for part in parts)
    assert whole == pytest.approx(losses.sum())
    at = np.concatenate([np.arange(first, len(piece)) for first, piece in zip(text.firsts, text.pieces, strict=True)])
    last = np.exp(losses[at >= 128].mean())
    assert parts[-1]["perplexity"] == pytest.approx(last) and parts[-1]["interval"][0] < last < parts[-1]["interval"][1]
    worse = Score({}, 1.0, {}, RangeLosses.of(losses + 0.1, text))
    ratio = perplexity_ratio(worse, Score({}, 1.0, {}, found))
    assert ratio and ratio["ratio"] == pytest.approx(np.exp(0.1))
    assert ratio["interval"] == pytest.approx([np.exp(0.1)] * 2) and len(ratio["by_position"]) == 4
    other = text_of([200] * 24)
    assert perplexity_ratio(worse, Score({}, 1.0, {}, RangeLosses.of(np.ones(other.offsets[-1]), other))) is None
    assert RangeLosses(**json.loads(json.dumps(asdict(found)))) == found


def test_intervals_are_over_documents_or_where_these_are_few_over_blocks():
    """A document repeats its own mean: intervals that take its tokens for independent are far too narrow."""
    rng = np.random.default_rng(0)
    many, few = text_of([100] * 40), text_of([2_000] * 3)
    for text, over in ((many, "documents"), (few, "blocks")):
        losses = np.ones(text.offsets[-1])
        for number, (start, end) in enumerate(zip(text.offsets, text.offsets[1:], strict=False)):
            losses[start:end] = 1 + number % 2 + 0.01 * rng.random(end - start)
        found = RangeLosses.of(losses, text).perplexity
        assert found["over"] == over and found["interval"][0] < found["perplexity"] < found["interval"][1]
        assert np.log(found["interval"][1] / found["interval"][0]) > 0.1
    mixed = text_of([40] * 30 + [200] * 5)
    parts = RangeLosses.of(np.ones(mixed.offsets[-1]), mixed).by_position
    assert [part["over"] for part in parts] == ["documents", "documents", "blocks", "blocks"]
    single = text_of([2])
    assert RangeLosses.of(np.ones(1), single).perplexity["interval"] is None


def test_less_text_than_asked_for_is_told(capsys, teacher_folder, recipe_file):
    options = ("evaluate", teacher_folder, "--recipe", recipe_file, "--set", "evaluate.perplexity_tokens=9000000")
    assert run_command(*options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert run_command(*options, "--json") == 0
    figures = json.loads(capsys.readouterr().out)[str(teacher_folder)]
    read = figures["perplexity_text"]
    texts = list(Corpus().documents("test", 0))
    assert read["tokens"] == sum(len(TOKENIZER(text).input_ids) + 1 for text in texts)
    assert read["documents"] == len(texts) and read["wanted"] == 9_000_000
    assert f"{read['tokens']:,} tokens of held-out text (all that there is, of 9,000,000 asked for) from " in printed
    assert f" from {len(texts):,} documents, each by itself, half of" in printed
    assert figures["perplexity_over"] == ("documents" if len(texts) >= 20 else "blocks")
    half = int(re.search(r"half of the tokens with fewer than ([\d,]+) before them", printed)[1].replace(",", ""))
    parts = figures["perplexity_by_position"]
    near = sum(part["tokens"] for part in parts if part["to"] < half)
    total = sum(part["tokens"] for part in parts)
    assert near >= total / 2 > near - next(part["tokens"] for part in parts if part["to"] == half - 1)


def test_evaluate_compares_with_the_first_in_json_and_in_tables_that_fit(capsys, tmp_path, teacher_folder, recipe_file):
    other = broken_copy(teacher_folder, tmp_path / "other")
    options = ("--recipe", recipe_file, "--lengths", "128,256", "--depths", 2, "--questions", 4, "--tokens")
    assert run_command("evaluate", teacher_folder, other, *options, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    first, second = figures[str(teacher_folder)], figures[str(other)]
    assert "minus_first" not in first and second["minus_first"]["recall"]["difference"] == 0
    assert second["minus_first"]["perplexity"]["ratio"] == pytest.approx(1)
    low, high = second["minus_first"]["grid"]["interval"]
    assert low == -high < 0
    assert first["recall_by_task"]["one_key"]["questions"] == 4
    assert {row["length"] for row in first["grid"]["rows"]} == {128, 256}
    tokens = second["minus_first"]["tokens"]
    assert tokens["classes"][0]["interval"] == [0, 0] and len(tokens["sample"]["tokens"]) == 127
    console = Console(width=100, record=True, file=StringIO())
    show_figures(console, figures)
    printed = console.export_text()
    assert "minus random" in printed and "recall at 256 tokens by depth" in printed and "mean of the grid" in printed
    lines = [line for line in printed.splitlines() if not line.startswith("left out")]
    assert max(map(len, lines)) <= 100 and "…" not in printed


def test_what_evaluate_refuses(capsys, tmp_path, teacher_folder, recipe_file):
    options = ("evaluate", teacher_folder, "--recipe", recipe_file)
    assert "at most 512 tokens; 600" in refused(capsys, *options, "--lengths", "600")
    assert "for example --lengths" in refused(capsys, *options, "--lengths", "many")
    assert "lines or ruler" in refused(capsys, *options, "--lengths", "64", "--style", "english")
    too_few = refused(capsys, *options, "--lengths", "64", "--questions", 3)
    assert "3 questions are fewer than 5 depths: give more questions, or fewer depths" in too_few
    assert "no task fits into 9 tokens" in refused(capsys, *options, "--lengths", "9")
    other = broken_copy(teacher_folder, tmp_path / "gpt2")
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 99}))
    assert "of type 'gpt2': give a teacher (" in refused(capsys, "evaluate", other, "--recipe", recipe_file)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    sentence = refused(capsys, *options, "--data", empty)
    assert "empty" in sentence
    assert "at least two" in refused(capsys, *options, "--tokens")


def test_tokens_are_classed_by_the_word_they_stand_in():
    pieces = ["The", " gr", "een", " file", "(", "12", "3", ")", "\n", " ", "isn", "'t", " the", "re", "."]
    expected = [FUNCTION, CONTENT, CONTENT, CONTENT, OPENING, DIGITS, DIGITS, CLOSING, SPACE, SPACE]
    assert kinds(pieces) == [*expected, CONTENT, CONTENT, FUNCTION, FUNCTION, SYMBOLS]
    text = "Some text (of 3 words) [here]."
    ids = TOKENIZER(text).input_ids
    assert "".join(pieces_of(TOKENIZER, ids)) == text


def test_the_longest_repeated_run_and_its_distance():
    ids = [1, 2, 3, 9, 1, 2, 3, 8, 2, 3, 8]
    lengths, distances = repeats(ids)
    assert lengths.tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    assert distances.tolist() == [0, 0, 0, 0, 4, 4, 4, 0, 3, 3, 3]
    assert repeats([5] * 6)[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_loss_on_one_class_is_found_there_and_nowhere_else(model):
    documents = Corpus().pool("test", 0, 30_000)
    ids = TOKENIZER("".join(documents)[:20_000]).input_ids
    rows = [ids[start : start + 100] for start in range(0, 3_000, 100)]
    classes = TokenClasses.of(HeldOut(rows, list(range(30)), [0] * 30, 100, 3_000), TOKENIZER)
    groups: dict[str, int] = {}
    for (group, _), mask in classes.masks.items():
        groups[group] = groups.get(group, 0) + int(mask.sum())
    everything = 30 * 99
    assert groups["all"] == groups["kind"] == groups["completes a repeated n-gram of"] == everything
    first = np.random.default_rng(0).random(30 * 99)
    worse = first + 0.5 * classes.masks["kind", "other symbols"]
    found = {(each["group"], each["class"]): each for each in classes.compare(worse, first)["classes"]}
    assert found["kind", "other symbols"]["difference"] == pytest.approx(0.5)
    assert found["kind", "other symbols"]["interval"] == pytest.approx((0.5, 0.5))
    assert found["kind", "content words"]["difference"] == 0
    low, high = found["all", "all tokens"]["interval"]
    assert 0 < low < found["all", "all tokens"]["difference"] < high < 0.5


def test_evaluate_says_whose_questions_it_asks_where_nobody_said(capsys, teacher_folder):
    few = ("--questions", 1, "--set", "evaluate.length=128", "--set", "evaluate.perplexity_tokens=256")
    easy = ("--set", "tasks={one: {task: many_keys, num_keys: 1}}")
    assert run_command("evaluate", teacher_folder, *few, *easy) == 0
    assert "recipe: demo" in capsys.readouterr().out
    assert run_command("evaluate", teacher_folder, *few, *easy, "--recipe", "demo") == 0
    assert "recipe: demo" not in capsys.readouterr().out
