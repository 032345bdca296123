"""A run trains on the split `train`, chooses on `train` and `validation`, and is judged on `test`."""

import importlib
import re

import pytest
from conftest import run_command, tiny_tokenizer

from flashmorph.data.corpus import Corpus
from flashmorph.data.rows import Rows, pack
from flashmorph.run.data import search_data
from flashmorph.tasks.words import names


def keys(text: str) -> set[str]:
    """The words of the names in lines that are facts or questions."""
    named = re.findall(r"^[@?] ([a-z]+(?: [a-z]+)?):", text, re.M)
    return {word for name in named for word in name.split()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_folder, recipe_file):
    """A run without extension whose rows of distillation are questions by half; and what it evaluates on."""
    output, asked = tmp_path_factory.mktemp("runs") / "out", []
    path = importlib.import_module("flashmorph.pipeline.morph")
    searched = importlib.import_module("flashmorph.run.models")
    really, searching = path.evaluate, []

    def evaluate(model, tokenizer, questions, *rest):
        asked.append(questions)
        return really(model, tokenizer, questions, *rest)

    def data(*given):
        searching.append(search_data(*given))
        return searching[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "evaluate", evaluate)
        patch.setattr(searched, "search_data", data)
        changes = ("--set", "extend=null", "--set", "baseline=null", "--set", "distill.retrieval_share=0.5")
        assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", output, *changes) == 0
    return output, asked, searching


def test_half_of_the_rows_are_questions_of_train_and_half_its_text(run, tmp_path):
    output, _, _ = run
    tokenizer = tiny_tokenizer()
    (file,) = output.glob("data/distill-*.npy")
    held = Rows(file)
    rows = [held[number]["input_ids"] for number in range(len(held))]
    asks = ["\n? " in tokenizer.decode(row) for row in rows]
    assert sum(asks) == len(rows) // 2 > 0
    for row in (row for row, is_question in zip(rows, asks, strict=True) if is_question):
        assert keys(tokenizer.decode(row)) and keys(tokenizer.decode(row)) <= set(names("train"))
    text = pack(Corpus(), tokenizer, "train", 64, len(rows) // 2, 0, tmp_path / "text.npy", None)
    of_text = [row for row, is_question in zip(rows, asks, strict=True) if not is_question]
    assert of_text == [text[number]["input_ids"] for number in range(len(text))]


def test_it_is_judged_on_names_of_test(run):
    _, asked, _ = run
    tokenizer = tiny_tokenizer()
    examples = [example for by_task in asked for each in by_task.values() for example in each]
    named = {key for example in examples for key in keys(tokenizer.decode(example.input_ids))}
    assert named and named <= set(names("test"))


def test_it_is_searched_on_train_and_checked_on_validation(run):
    _, _, searching = run
    tokenizer = tiny_tokenizer()
    for data in searching:
        for examples, split in ((data.batch(0), "train"), (data.questions(), "validation")):
            named = {key for example in examples for key in keys(tokenizer.decode(example.input_ids))}
            assert named and named <= set(names(split)), split
    assert searching
