"""The bridge to lm-evaluation-harness: the same figures as ours on the same items; a clear word where it is missing."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import run_command
from test_cli import refused

from flashmorph.convert.teacher import open_model
from flashmorph.data.corpus import Corpus
from flashmorph.data.heldout import HeldOut
from flashmorph.evaluation import answers_right, text_losses
from flashmorph.evaluation.harness import Harness, HarnessFigure
from flashmorph.tasks import STYLES, Haystack, Layout, TaskSettings, make_example


def task_file(folder, name: str, rows: list[dict], **settings):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path.write_text(yaml.safe_dump({**task, "test_split": "test", "metadata": {"version": 1.0}, **settings}))
    return path


def metric(name: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def tiny():
    return open_model("tiny", torch.device("cpu"))


@pytest.fixture
def harness(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def scores(path, tiny) -> dict[str, HarnessFigure]:
    model, tokenizer = tiny
    return {figure.metric: figure for figure in Harness([str(path)]).scores(model, tokenizer, path.parent, 4)}


def test_likelihoods_are_ours(harness, tiny, tmp_path):
    model, tokenizer = tiny
    documents = [text[:700] for text in Corpus().pool("test", 0, 60_000)][:6]
    settings = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    word = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    path = task_file(tmp_path, "ours_text", [{"text": text} for text in documents], metric_list=word, **settings)
    figure = scores(path, tiny)["word_perplexity"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ours = []
    for text in documents:
        ids = [start, *tokenizer(text, add_special_tokens=False).input_ids]
        ours.append(-text_losses(model, HeldOut([ids], [0], [0], len(ids), len(ids))).sum())
    assert figure.values == pytest.approx(ours, abs=1e-3)
    assert figure.weights and figure.value == pytest.approx(math.exp(-sum(ours) / sum(figure.weights)))
    low, high = figure.interval
    assert low < figure.value < high


def test_exact_matches_are_ours(harness, tiny, tmp_path):
    model, tokenizer = tiny
    style = STYLES["lines"]
    layout = Layout(tokenizer, style, Haystack(Corpus().pool("test", 0, 200_000)))
    tasks = [TaskSettings(task="many_keys", num_keys=4), TaskSettings(task="many_values", num_values=2)]
    examples = [make_example(tasks[number % 2], layout, style, "test", 120, 0, number) for number in range(60)]
    prompts = [tokenizer.decode(example.input_ids[: example.prompt_tokens]) for example in examples]
    same = [
        (example, prompt)
        for example, prompt in zip(examples, prompts, strict=True)
        if tokenizer(prompt, add_special_tokens=False).input_ids == example.input_ids[: example.prompt_tokens]
    ]
    assert len(same) >= 8
    path = task_file(
        tmp_path,
        "ours_recall",
        [{"prompt": prompt, "answer": example.answer} for example, prompt in same],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        metric_list=metric("exact_match"),
    )
    figure = scores(path, tiny)["exact_match"]
    ours = answers_right(model, tokenizer, [example for example, _ in same])
    assert [value == 1 for value in figure.values] == ours
    assert 0 < figure.value < 1 and figure.interval[0] < figure.value < figure.interval[1]


def test_evaluate_hands_tasks_on_and_names_the_nearest(harness, tmp_path, teacher_folder, recipe_file, capsys):
    rows = [{"question": "a b", "choices": [" c", " d"], "label": number % 2} for number in range(6)]
    choices = {"doc_to_text": "{{question}}", "doc_to_target": "label", "doc_to_choice": "{{choices}}"}
    path = task_file(tmp_path, "toy", rows, output_type="multiple_choice", metric_list=metric("acc"), **choices)
    options = ("evaluate", teacher_folder, "--recipe", recipe_file)
    assert run_command(*options, "--tasks", path) == 0
    assert "toy acc" in capsys.readouterr().out
    assert "did you mean 'hellaswag'" in refused(capsys, *options, "--tasks", "helaswag")
    assert "no task file" in refused(capsys, *options, "--tasks", tmp_path / "none.yaml")


def test_a_task_without_its_data_is_told_before_anything_else_is_asked(
    harness, monkeypatch, tmp_path, teacher_folder, recipe_file, capsys
):
    monkeypatch.setattr(
        "flashmorph.pipeline.evaluate_models.evaluate", lambda *given: pytest.fail("questions were asked")
    )
    path = task_file(tmp_path, "toy", [], output_type="loglikelihood", doc_to_text="a", doc_to_target="b")
    (tmp_path / "toy.jsonl").unlink()
    sentence = refused(capsys, "evaluate", teacher_folder, "--recipe", recipe_file, "--tasks", path)
    assert "lm-evaluation-harness cannot run" in sentence


def test_without_the_harness_one_sentence_says_how_to_get_it(monkeypatch, capsys, teacher_folder, recipe_file):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    sentence = refused(capsys, "evaluate", teacher_folder, "--recipe", recipe_file, "--tasks", "hellaswag")
    assert "pip install 'flashmorph[eval]'" in sentence


def test_differences_are_paired_by_item():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 40, size=50).astype(float)
    losses = rng.normal(-60, 20, size=50)
    first = HarnessFigure("t", "word_perplexity", 8.0, False, losses.tolist(), lengths.tolist())
    second = HarnessFigure("t", "word_perplexity", 8.8, False, (losses - 0.1 * lengths).tolist(), lengths.tolist())
    minus = second.minus(first)
    assert minus and minus["ratio"] == pytest.approx(1.1)
    assert minus["interval"] == pytest.approx([math.exp(0.1)] * 2)
    assert first.interval[0] < math.exp(-losses.sum() / lengths.sum()) < first.interval[1]
    hits = HarnessFigure("t", "acc", 0.5, True, [0.0, 1.0] * 10)
    same = hits.minus(hits)
    assert same and same["difference"] == 0 and same["interval"][0] == -same["interval"][1] < 0 < hits.interval[0] - 0.2
    assert hits.minus(HarnessFigure("t", "acc", 0.5, True, [0.0, 1.0])) is None
