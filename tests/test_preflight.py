"""What can be known before any stage: too little text, tasks and contexts that do not fit, told in one sentence."""

import gzip
import json
import lzma
import re
from itertools import count, islice
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from conftest import FEW_STEPS, random_qwen3, run_command, tiny_tokenizer
from test_textfiles import write_rows

from flashmorph.data.corpus import Corpus, no_text
from flashmorph.data.formats import split_of
from flashmorph.data.heldout import hold_out
from flashmorph.data.rows import pack
from flashmorph.data.supply import measure
from flashmorph.errors import UserError
from flashmorph.recipe.fitting import fit, require_beyond_windows
from flashmorph.recipe.preflight import check_tasks, check_text, reach_text
from flashmorph.recipe.recipe import load_recipe

EVERY = ("align", "select", "distill", "extend", "evaluate")
SPLITS = {"train", "validation", "test", "referee"}


def rows_file(path: Path, number: int, words: int = 40, splits: set[str] = SPLITS) -> Path:
    """JSONL, so many rows of the wanted splits."""
    texts = (f"Row {place}. " + f"word{place} " * words for place in count())
    kept = list(islice((text for text in texts if split_of(text) in splits), number))
    content = "".join(json.dumps({"text": text}) + "\n" for text in kept).encode()
    open_file = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with open_file(path, "wb") as stream:
        stream.write(content)
    return path


def told(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("missing", ["validation", "test", "train"])
def test_a_split_without_text_is_refused_before_the_first_stage(teacher_folder, recipe_file, tmp_path, capsys, missing):
    text = rows_file(tmp_path / "rows.jsonl", 200, splits=SPLITS - {missing})
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--data", text, "--allow-repeat")
    for command in (("morph",), ("morph", "--dry-run")):
        assert run_command(command[0], teacher_folder, *options, *command[1:]) == 2
        assert f"no text for the split '{missing}'" in told(capsys)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_read_are_named_before_all_else(teacher_folder, recipe_file, tmp_path, capsys):
    folder, saved = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    rows_file(folder / "rows.jsonl", 300)
    (folder / "report.pdf").touch()
    options = ("--recipe", recipe_file, "--data", folder, "--allow-repeat", "--output", saved)
    assert run_command("morph", teacher_folder, *options, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: 1 file is not read, 1 .pdf (report.pdf)")
    assert run_command("build", teacher_folder, *options, "--layers", "0", "--set", "extend=null") == 0
    assert lines[0] in capsys.readouterr().out
    assert run_command("evaluate", teacher_folder, "--recipe", recipe_file, "--data", folder) == 0
    assert lines[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "number, of_each", [(1, "1 document (1 train)"), (9, "9 documents (9 train)"), (30, "30 documents (30 train)")]
)
def test_too_few_documents_are_counted_with_what_is_needed(recipe_file, tmp_path, number, of_each):
    """For all splits at once, in a folder of files as in rows, and with what a document is."""
    rows = rows_file(tmp_path / "rows.jsonl", number, splits={"train"})
    folder = tmp_path / "texts"
    folder.mkdir()
    for place, line in enumerate(rows.read_text().splitlines()):
        (folder / f"{place}.txt").write_text(json.loads(line)["text"])
    for source in (rows, folder):
        recipe = load_recipe(recipe_file, {"data.source": str(source), "data.max_passes": None})
        with pytest.raises(UserError) as error:
            check_text(recipe, tiny_tokenizer(), EVERY)
        says = str(error.value)
        assert says.startswith(
            f"{source} has no text for the splits 'validation' (the search) and 'test' (evaluation): "
        )
        assert f"it has {of_each}, and of all documents 5% each go to validation, referee, test" in says
        assert "give 100 different ones or more, or cut yours up" in says and "20,000 characters" in says


@pytest.mark.parametrize("command", ["pool", "rows", "held out"])
def test_a_reader_of_a_split_without_text_counts_the_documents_too(tmp_path, command):
    """Where nothing was checked before: `evaluate`, or a dataset of the hub, whose documents are not counted."""
    corpus, tokenizer = Corpus(str(rows_file(tmp_path / "rows.jsonl", 30, splits={"train"}))), tiny_tokenizer()
    with pytest.raises(UserError, match=r"for the split 'validation' \(the search\): it has 30 documents \(30 train\)"):
        if command == "pool":
            corpus.pool("validation", 0)
        elif command == "rows":
            pack(corpus, tokenizer, "validation", 8, 4, 0, tmp_path / "rows.npy")
        else:
            hold_out(corpus, tokenizer, "validation", 8, 100, 0)
    assert "it has" not in str(no_text(Corpus("org/set"), "test"))


def test_one_long_text_has_documents_and_a_shorter_one_is_a_single_one(recipe_file, tmp_path):
    words = "".join(f"Sentence {number} of a text. " for number in range(100_000))
    for size, says in ((50_000, "1 document (1 "), (90_000, "3 documents (")):
        (tmp_path / "text.txt").write_text(words[:size])
        recipe = load_recipe(recipe_file, {"data.source": str(tmp_path / "text.txt"), "data.max_passes": None})
        with pytest.raises(UserError) as error:
            check_text(recipe, tiny_tokenizer(), EVERY)
        assert says in str(error.value)
    (tmp_path / "text.txt").write_text(words)
    check_text(recipe, tiny_tokenizer(), EVERY)


def test_text_of_empty_rows_is_named_as_such(recipe_file, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(
        UserError, match="rows.jsonl has no text for the splits 'train' .*: all of its files or rows are"
    ):
        check_text(load_recipe(recipe_file, {"data.source": str(tmp_path / "rows.jsonl")}), tiny_tokenizer(), EVERY)


@pytest.mark.parametrize(
    "source", ["/nowhere/at/all", "./texts", "texts.jsonl", "texts/rows.txt", "my/own/texts", "~/texts"]
)
def test_text_that_is_not_there_is_refused_before_the_first_stage(
    teacher_folder, recipe_file, tmp_path, capsys, source, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for dry in ((), ("--dry-run",)):
        options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--data", source, *dry)
        assert run_command("morph", teacher_folder, *options) == 2
        assert f"there is no file or folder '{source}'" in told(capsys)
    assert not (tmp_path / "out").exists()


def test_what_may_be_called_as_datasets_are_is_none_of_the_users_own_files():
    assert Corpus("HuggingFaceFW/fineweb-edu").paths() is None and Corpus("squad").paths() is None


def test_replies_to_be_learnt_of_text_are_refused_before_the_first_stage(recipe_file, tmp_path):
    text = rows_file(tmp_path / "rows.jsonl", 200)
    changes = {"data.source": str(text), "data.loss_on": "replies", "data.max_passes": None}
    with pytest.raises(UserError, match="`loss_on: replies` is for conversations"):
        check_text(load_recipe(recipe_file, changes), tiny_tokenizer(), EVERY)


def test_conversations_without_a_template_are_refused_before_the_first_stage(recipe_file, tmp_path):
    talk = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So it is."}]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(20)))
    recipe = load_recipe(recipe_file, {"data.source": str(file), "data.max_passes": None})
    with pytest.raises(UserError, match="no chat template"):
        check_text(recipe, tiny_tokenizer(), EVERY)


def test_a_split_that_is_not_read_may_be_empty(teacher_folder, recipe_file, tmp_path):
    text = rows_file(tmp_path / "rows.jsonl", 200, splits={"train"})
    recipe = load_recipe(recipe_file, {"data.source": str(text), "select.strategy": "uniform"})
    check_text(recipe, tiny_tokenizer(), ("align", "select", "distill"))
    with pytest.raises(UserError, match="no text for the split 'test'"):
        check_text(recipe, tiny_tokenizer(), EVERY)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz"])
def test_too_little_text_for_the_last_stage_is_told_before_the_first(
    teacher_folder, recipe_file, tmp_path, capsys, name
):
    text = rows_file(tmp_path / name, 300)
    long = ("--set", "extend.tokens=10000000")
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--data", text, *long)
    assert run_command("morph", teacher_folder, *options) == 2
    sentence = told(capsys)
    assert "is too small" in sentence and "read 4 times at most, and extend needs 9,999,872; give" in sentence
    assert not (tmp_path / "out").exists()
    recipe = load_recipe(recipe_file, {"data.source": str(text), "extend.tokens": 10_000_000, "data.max_passes": None})
    check_text(recipe, tiny_tokenizer(), EVERY)


@pytest.mark.parametrize("words", ["texts", "talks"])
def test_all_stages_that_text_is_too_little_for_are_named_with_tokens_that_do(recipe_file, tmp_path, words):
    """Also of several sources at once; what is proposed is enough for the check and for packing."""
    sources, tokenizer = [], tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    for name, number in (("one", 120), ("two", 150)):
        rows = [json.loads(line) for line in rows_file(tmp_path / "rows", number).read_text().splitlines()]
        talks = [{"messages": [{"role": "user", "content": row["text"]}]} for row in rows]
        sources.append(write_rows(tmp_path / f"{name}.jsonl", talks if words == "talks" else rows))
    mixture = [{"source": str(source), "weight": weight} for source, weight in zip(sources, (1, 3), strict=True)]
    changes = {"data.mixture": mixture, "align.tokens": 200_000, "extend.tokens": 1_000_000,
               "extend.retrieval_share": 0.5}  # fmt: skip
    stages = ("align", "distill", "extend")
    with pytest.raises(UserError) as error:
        check_text(load_recipe(recipe_file, changes), tokenizer, stages)
    says = str(error.value)
    assert says.count("is too small") == 2 and "distill" not in says and len(says.splitlines()) == 1
    assert "one.jsonl is too small" in says and "and align needs 149,952, extend needs 374,976; give more" in says
    proposed = dict(re.findall(r"--set (\w+\.tokens)=(\d+)", says))
    assert list(proposed) == ["align.tokens", "extend.tokens"]
    recipe = load_recipe(recipe_file, {**changes, **{key: int(value) for key, value in proposed.items()}})
    check_text(recipe, tokenizer, stages)
    for settings in (recipe.align, recipe.extend):
        assert settings and settings.tokens > 10_000
        rows = settings.rows - settings.questions
        pack(recipe.data.corpus, tokenizer, "train", settings.length, rows, 0, tmp_path / f"{settings.stage}.npy", 4)


def test_where_not_even_a_step_fits_no_tokens_are_proposed(recipe_file, tmp_path):
    text = rows_file(tmp_path / "rows.jsonl", 200, words=1)
    big = {"data.source": str(text), "align.batch_tokens": 1 << 20, "align.tokens": 1 << 20}
    with pytest.raises(UserError, match="align needs 1,048,576; give more --data, or --allow-repeat$"):
        check_text(load_recipe(recipe_file, big), tiny_tokenizer(), EVERY)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet"])
def test_what_a_sample_says_is_at_least_what_there_is(tmp_path, monkeypatch, suffix):
    path, tokenizer = tmp_path / f"rows{suffix}", tiny_tokenizer()
    plain = rows_file(tmp_path / f"plain{suffix.replace('.parquet', '.jsonl')}", 800)
    if suffix == ".parquet":
        texts = [json.loads(line)["text"] for line in plain.read_text().splitlines()]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        plain.rename(path)
    corpus = Corpus(str(path))
    exact = sum(len(tokenizer(text).input_ids) for text in corpus.documents("train", 0))
    whole = measure(corpus, tokenizer, float("inf"), SPLITS)
    assert whole.whole and exact <= whole.tokens <= 1.1 * exact
    monkeypatch.setattr("flashmorph.data.supply._TOKENISED", 10_000)
    sampled = measure(corpus, tokenizer, float("inf"), set())
    assert not sampled.whole and exact <= sampled.tokens <= 4 * exact


@pytest.mark.parametrize(
    "tasks, changes, says",
    [
        ({"many": {"task": "many_keys", "num_keys": 40}}, {}, "task 'many' .*select.search.length=96.*needs at least"),
        ({"long": {"task": "hops", "num_chains": 40}}, {"evaluate.length": 512}, "task 'long' .*one-word keys"),
        ({"asked": {"task": "many_keys", "num_keys": 8, "num_asked": 8}},
         {"select.strategy": "uniform", "evaluate.length": 64}, "evaluate.length=64"),
        ({"rows": {"task": "many_keys", "num_keys": 8}},
         {"select.search.length": 512, "distill.retrieval_share": 0.5, "distill.length": 32}, "distill.length=32"),
    ],
)  # fmt: skip
def test_tasks_that_do_not_fit_are_named(recipe_file, tasks, changes, says):
    recipe = load_recipe(recipe_file, {"tasks": tasks, **changes})
    with pytest.raises(UserError, match=says):
        check_tasks(recipe, tiny_tokenizer(), EVERY, 4096)


def test_names_are_counted_in_the_split_that_is_asked(recipe_file):
    long = {"select.search.length": 1024, "evaluate.length": 1024}
    recipe = load_recipe(recipe_file, {"tasks": {"chains": {"task": "hops", "num_chains": 12}}, **long})
    with pytest.raises(UserError, match="split 'validation'"):
        check_tasks(recipe, tiny_tokenizer(), EVERY, 4096)
    check_tasks(recipe, tiny_tokenizer(), ("align", "evaluate"), 4096)


def test_what_nobody_asked_for_ends_at_the_teachers_limit():
    config = random_qwen3(max_position_embeddings=2048).config
    recipe, line = fit(load_recipe("default"), config)
    assert recipe.select.search.length == (1024, 2048)
    assert recipe.evaluate.length == recipe.extend.length == 2048 and recipe.align.length == 512
    assert recipe.extend.tokens == load_recipe("default").extend.tokens
    assert "2,048" in line and "extend.length 16,384 -> 2,048" in line and "align" not in line and "\n" not in line
    assert fit(recipe, config) == (recipe, "")
    shorter, _ = fit(load_recipe("default", {"extend": None}), random_qwen3(max_position_embeddings=256).config)
    assert shorter.select.search.length == (256, 256) and shorter.align.length == 256 and shorter.extend is None


@pytest.mark.parametrize(("section", "split"), [("extend", "train"), ("evaluate", "test")])
def test_long_documents_that_are_not_there_are_missed_before_the_first_stage(
    teacher_folder, recipe_file, tmp_path, capsys, section, split
):
    text = rows_file(tmp_path / "rows.jsonl", 300, words=60)
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--data", text, "--allow-repeat", "--dry-run")
    changes = ("--set", f"{section}.documents=long", "--set")
    assert run_command("morph", teacher_folder, *options, *changes, f"{section}.length=512") == 2
    assert re.search(
        f"{section}.documents=long: .* has no document of 512 tokens or more in the split '{split}'", told(capsys)
    )
    assert run_command("morph", teacher_folder, *options, *changes, f"{section}.length=128") == 0


@pytest.mark.parametrize(
    "host, length",
    [
        ({"window": 170}, 512),
        ({"window": 171}, 1024),
        ({"window": 1024}, 4096),
        ({"window": 3000}, 4096),
        ({"window": 128, "mixers": "full,window"}, 512),
        ({}, 512),
    ],
)
def test_rows_of_distillation_are_longer_than_a_window(host, length):
    """Within it a hybrid is its teacher, and steps would follow rounding errors."""
    config = random_qwen3(max_position_embeddings=4096).config
    recipe, line = fit(load_recipe("default", {"host": host}), config)
    assert recipe.distill.length == length and recipe.distill.tokens == load_recipe("default").distill.tokens
    assert ("distill.length 512 -> " in line) == (length != 512)
    require_beyond_windows(recipe, config)
    assert fit(recipe, config) == (recipe, "")


@pytest.mark.parametrize(
    "host, exact", [({"window": 256}, 256), ({"window": 256, "mixers": "full,window", "sinks": 3}, 259)]
)
def test_rows_within_a_window_are_refused_where_they_were_asked_for(host, exact):
    config = random_qwen3(max_position_embeddings=4096).config
    for length in (exact - 1, exact, exact + 1):
        recipe, line = fit(load_recipe("default", {"host": host, "distill.length": length}), config)
        assert recipe.distill.length == length and "distill.length" not in line
        if length > exact:
            require_beyond_windows(recipe, config)
        else:
            with pytest.raises(UserError, match=f"distill.length is {length} tokens, and rows of that length lie with"):
                require_beyond_windows(recipe, config)


@pytest.mark.parametrize("command", [("estimate",), ("morph", "--dry-run", "--output", "out")])
def test_the_default_recipe_fits_a_short_teacher_and_what_was_asked_for_is_refused(
    teacher_folder, tmp_path, capsys, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name, *more = command
    options = (name, teacher_folder, "--recipe", "default", "--data", "demo", "--set", "data.max_passes=null", *more)
    easy = ("--set", "tasks={one: {task: many_keys, num_keys: 1}}")
    assert run_command(*options, *easy) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "->" in line and "limit" in line]
    assert "evaluate.length 16,384 -> 512" in line and "extend.length 16,384 -> 512" in line
    for key in ("extend.length", "evaluate.length", "align.length", "select.search.length"):
        assert run_command(*options, *easy, "--set", f"{key}=1024") == 2
        assert f"{key} is 1,024 tokens and the teacher's limit is 512" in told(capsys)
    if name == "morph":
        assert run_command(*options) == 2
        assert "ten_keys_all" in (sentence := told(capsys)) and "512, the teacher's limit" in sentence


def test_lengths_in_a_recipe_of_ones_own_are_asked_for_and_defaults_are_not(tmp_path):
    config, file = random_qwen3(max_position_embeddings=512).config, tmp_path / "recipe.yaml"
    own = {name: value for name, value in FEW_STEPS.items() if name != "evaluate"}
    file.write_text(yaml.safe_dump({**own, "extend": {**own["extend"], "length": 1024}}))
    recipe, line = fit(load_recipe(file), config)
    assert recipe.extend.length == 1024 and recipe.evaluate.length == 512
    assert "extend" not in line and "evaluate.length 16,384 -> 512" in line


def test_a_dataset_that_cannot_be_reached_is_told_before_the_first_stage(
    teacher_folder, recipe_file, tmp_path, capsys, monkeypatch
):
    """But a run that goes on may have all its text."""
    out = tmp_path / "run"
    command = ("morph", teacher_folder, "--recipe", recipe_file, "--data", "org/nothing", "--output", out)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_command(*command) == 2
    assert "no text at 'org/nothing'" in (sentence := told(capsys)) and "--data" in sentence and not out.exists()
    with pytest.raises(UserError, match="org/nothing"):
        reach_text(load_recipe(recipe_file, {"data.source": "org/nothing"}), tiny_tokenizer())
    reach_text(load_recipe("demo"), tiny_tokenizer())


def test_a_command_that_reads_no_text_reaches_for_none(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("flashmorph.run.open.reach_text", lambda *_: pytest.fail("reached for text"))
    command = ["build", teacher_folder, "--layers", "0", "--set", "data.source=org/nothing", "--output"]
    assert run_command(*command, tmp_path / "run", "--window", "16") == 0
    with pytest.raises(pytest.fail.Exception):
        run_command(*command, tmp_path / "other")
