"""What makes a stage run again, and what does not: changes of recipe, teacher and text, and the stages they move."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import FEW_STEPS
from safetensors.torch import load_file, save_file

from flashmorph.convert.load import load_config
from flashmorph.convert.teacher import open_teacher
from flashmorph.files import content_digest, digest_of
from flashmorph.hosts import configure
from flashmorph.pipeline.branches import run_align, run_transplant
from flashmorph.pipeline.curve import run_curve
from flashmorph.pipeline.morph import finish, run_evaluate, run_select
from flashmorph.plan import Budget, Space
from flashmorph.recipe.recipe import load_recipe
from flashmorph.run.folder import Stage
from flashmorph.run.run import Run

TRAINED = {"distill", "extend", "evaluate distill", "evaluate extend"}
JUDGED = {"curve", "evaluate build", "evaluate distill", "evaluate extend"}
SEARCHED = {"select", "curve"}
FROM_ALIGN = {"align", "build", "evaluate build", *SEARCHED, *TRAINED}
EVERYTHING = {"transplant", *FROM_ALIGN}
ASKING = {f"{stage}.retrieval_share": 0.5 for stage in ("align", "distill", "extend")}
LOSSES = {"starts": [1], "length": 2, "tokens": 1, "wanted": 1, "documents": [0], "ranges": [0], "counts": [1]}
POINT = {"assignments": {"layers.0": "full"}, "strip": "", "loss": 0.0, "recall": 0.0, "cache_bytes": {"1": 1}}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@dataclass
class Dry(Run):
    """A run whose stages do nothing: each only says by what digest it is known."""

    def stage(self, name, about, settings, inputs, work, alone=False, label=None) -> Stage:
        digest = digest_of([name, settings, inputs])
        return Stage(name, digest, self.folder, {"perplexity": 1.0, "cache_bytes": {}})


@pytest.fixture
def teacher(tmp_path, teacher_folder) -> Path:
    return Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder of rows."""
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [{"text": f"Row {number} of a text about {number * number}."} for number in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def digests(tmp_path, teacher, monkeypatch):
    """The digest of every stage of the path and of the curve under some changes of the recipe.

    On a machine without fast bfloat16, wherever this runs: `bf16: auto` is false there.
    """
    monkeypatch.setattr("flashmorph.recipe.recipe.use_bf16", lambda device: False)

    def find(changes: dict) -> dict[str, str]:
        folder, recipe = tmp_path / "stage", tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**FEW_STEPS, "baseline": None}))
        opened = open_teacher(str(teacher))
        config = load_config(teacher)
        configure(config)[1].save_pretrained(folder / "model")
        space = Space.of_layers(config.num_hidden_layers)
        space.plan(["layers.1"], Budget("layers", 1)).save(folder / "plan.json")
        (folder / "right.json").write_text("{}")
        (folder / "text.json").write_text(json.dumps({**LOSSES, "sums": [0.0]}))
        (folder / "curve.json").write_text(json.dumps({"strategy": "none", "points": [POINT]}))
        run = Dry(opened, load_recipe(recipe, changes), folder, torch.device("cpu"), SimpleNamespace())
        host = run_transplant(run)
        branches = run_align(run, host)
        plan = run_select(run, host, branches)
        stages = {"transplant": host, "align": branches, **finish(run, host, branches, plan)}
        found = {name: stage.digest for name, stage in stages.items()}
        asked: list[str] = []
        run.stage = lambda name, about, settings, inputs, *rest, **more: (
            asked.append(digest_of([name, settings, inputs])) or Dry.stage(run, name, about, settings, inputs, None)
        )
        for name in ("build", "distill", "extend"):
            run_evaluate(run, name, stages[name])
        run_select(run, host, branches)
        run_curve(run, host, branches, 2)
        names = ["evaluate build", "evaluate distill", "evaluate extend", "select", "curve"]
        return found | dict(zip(names, asked, strict=True))

    return find


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name, digest in before.items() if after[name] != digest}


@pytest.mark.parametrize(
    "first, change, again",
    [
        ({}, {"data.max_passes": None}, set()),
        ({}, {"align.checkpoint_steps": 3, "distill.checkpoint_steps": 2}, set()),
        ({}, {"align.micro_batch_tokens": 64, "extend.micro_batch_tokens": None}, set()),
        ({}, {"distill.activation_checkpointing": True, "extend.activation_checkpointing": False}, set()),
        ({}, {"select.search.micro_batch_tokens": 192, "evaluate.batch_tokens": 128}, set()),
        ({}, {"report_to": ["tensorboard"], "shard": True, "baseline": "uniform"}, set()),
        ({}, {"align.tokens": 520, "extend.tokens": 600}, set()),
        ({}, {"budget": " 1 "}, set()),
        ({"bf16": False}, {"bf16": "auto"}, set()),
        ({}, {"data.column": "body", "data.config": "some"}, set()),
        ({}, {"data.haystack": "repeated"}, SEARCHED | JUDGED),
        ({}, {"style": "prose"}, SEARCHED | JUDGED),
        (ASKING, {"style": "prose"}, FROM_ALIGN),
        (ASKING, {"data.haystack": "repeated"}, FROM_ALIGN),
        ({"select.strategy": "uniform"}, {"select.search.batch_tokens": 96, "bf16": True}, FROM_ALIGN),
        ({"select.strategy": "uniform"}, {"select.search.batch_tokens": 96}, set()),
        ({"select.strategy": "uniform"}, {"style": "prose"}, JUDGED),
        ({"select.strategy": "drop-one"}, {"select.search.batch_tokens": 96}, set()),
        ({}, {"select.search.batch_tokens": 96}, SEARCHED),
        ({}, {"select.search.questions": 5}, SEARCHED),
        ({}, {"select.search.text_tokens": 4096}, set()),
        ({"select.strategy": "halo"}, {"select.search.text_tokens": 4096}, SEARCHED),
        ({}, {"select.settings.steps": 13}, SEARCHED),
        ({"select.strategy": "kl"}, {"distill.tokens": 640}, TRAINED),
        ({"select.strategy": "kl"}, {"distill.learning_rate": 0.01}, TRAINED | SEARCHED),
        ({}, {"distill.learning_rate": 0.01}, TRAINED),
        ({}, {"extend.tokens": 1024}, {"extend", "evaluate extend"}),
        ({}, {"evaluate.questions": 5}, JUDGED - {"curve"}),
        ({}, {"evaluate.dtype": "bfloat16"}, JUDGED),
        ({}, {"distill.isolate_documents": False}, TRAINED),
        ({}, {"calibration_rows": 3}, FROM_ALIGN),
        ({}, {"seed": 1}, FROM_ALIGN),
    ],
)  # fmt: skip
def test_a_recipe_moves_the_stages_whose_result_it_changes(digests, first, change, again):
    assert moved(digests(first), digests({**first, **change})) == again


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def a_template(teacher: Path) -> None:
    (teacher / "chat_template.jinja").write_text(TEMPLATE)


def a_template_inside(teacher: Path) -> None:
    edit_json(teacher / "tokenizer_config.json", chat_template=TEMPLATE)


def other_sampling(teacher: Path) -> None:
    (teacher / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))


def another_end(teacher: Path) -> None:
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))


def another_tokenizer(teacher: Path) -> None:
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_weights(teacher: Path) -> None:
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "edit, again",
    [
        (a_template, set()),
        (a_template_inside, set()),
        (other_sampling, set()),
        (another_end, JUDGED),
        (another_tokenizer, FROM_ALIGN),
        (other_weights, EVERYTHING),
    ],
)
def test_a_file_of_the_teacher_moves_the_stages_that_read_it(digests, teacher, edit, again):
    before = digests({})
    edit(teacher)
    assert moved(before, digests({})) == again


def test_a_template_whose_turns_end_as_texts_do_moves_the_stage_that_learns_next_tokens(digests, teacher):
    """Not what is distilled: there the teacher says what to expect."""
    before = digests({})
    (teacher / "chat_template.jinja").write_text(TEMPLATE.replace("\n", "{{ eos_token }}"))
    assert moved(before, digests({})) == {"extend", "evaluate extend"}


@pytest.mark.parametrize("edit", [a_template, a_template_inside])
def test_a_template_words_conversations_and_nothing_else(digests, teacher, tmp_path, edit):
    a_template(teacher) if edit is a_template_inside else a_template_inside(teacher)
    talks = [{"messages": [{"role": "user", "content": f"How much is {n}?"}]} for n in range(50)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    change = {"data.source": str(tmp_path / "talks.jsonl")}
    before = digests(change)
    edit(teacher)
    assert moved(before, digests(change)) == FROM_ALIGN


def test_local_text_is_what_is_in_its_files_wherever_they_lie(digests, text, tmp_path, monkeypatch):
    before = digests({"data.source": str(text)})
    monkeypatch.chdir(tmp_path)
    assert digests({"data.source": "text"}) == before
    text.rename(tmp_path / "elsewhere")
    assert digests({"data.source": "elsewhere/"}) == before
    rows = tmp_path / "elsewhere" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("Row 7 of", "Row 8 of"))
    assert moved(before, digests({"data.source": "elsewhere"})) == FROM_ALIGN


def test_a_large_file_is_known_by_blocks_all_over_it(tmp_path):
    path = tmp_path / "large"
    content = bytearray(1 << 21)
    found = set()
    for turn, place in enumerate((None, 0, (1 << 21) - 1)):
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        found.add(content_digest(path, len(content), turn, 1 << 18))
    assert len(found) == 3
