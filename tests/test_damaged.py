"""Numbers that no run can have, and files of a stage that a power cut has left half written."""

import json
import logging
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from flashmorph.errors import UserError
from flashmorph.inputs.readyaml import read_yaml
from flashmorph.inputs.shapes import Finite, has_broken_seal, misfit, sealed
from flashmorph.recipe.recipe import Recipe, load_recipe
from flashmorph.stages.checkpoints import FINISHED, drop_damaged, finish, last_checkpoint
from flashmorph.stages.training import logged


def numbers_in(values: dict, before: str = "") -> dict[str, float]:
    """The settings that are numbers, by their names."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= numbers_in(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{before}{name}"] = value
    return found


NUMBERS = {
    name: value
    for name, value in numbers_in(load_recipe("default").model_dump(mode="json")).items()
    if not name.startswith("select.settings.")  # A strategy's own are held against its signature.
}


@pytest.mark.parametrize("value", [True, float("inf"), float("nan"), 10**30, 1e300, -1, [], "", None])
def test_a_number_of_a_recipe_is_one_that_makes_sense(value):
    assert len(NUMBERS) > 30
    for name in NUMBERS:
        if value is None and name in ("data.max_passes", "align.micro_batch_tokens"):
            continue
        if value == -1 and name.startswith("tasks."):
            continue  # Tasks say themselves what is too little, when they are asked.
        with pytest.raises(UserError) as told:
            load_recipe("default", {name: value})
        assert name.rpartition(".")[2] in str(told.value) and len(str(told.value)) < 300


def test_all_else_of_the_shipped_recipes_is_as_it_was():
    for name in ("demo", "laptop", "default", "chat"):
        recipe = load_recipe(name)
        assert Recipe.model_validate(read_yaml(recipe.to_yaml(), "it")) == recipe


@pytest.mark.parametrize("empty", ["data.source", "data.config", "data.column", "data.split"])
def test_an_empty_name_is_refused(empty):
    with pytest.raises(UserError, match=empty):
        load_recipe("demo", {empty: ""})


def test_references_in_yaml_stand_for_what_they_name_and_no_bomb():
    assert read_yaml("a: &x [1, 2]\nb: *x", "it") == {"a": [1, 2], "b": [1, 2]}
    levels = [f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 9)}]" for level in range(1, 12)]
    for text in ("\n".join(["x0: &x0 [1]", *levels]), "&a [*a]", "a: &a {b: *a}"):
        with pytest.raises(UserError, match="stands for more than"):
            read_yaml(text, "it")


@pytest.fixture
def stage(tmp_path):
    """A stage with two whole checkpoints."""
    for step in (1, 2):
        place = tmp_path / "checkpoints" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"weight": torch.ones(4)}, place / "trainable.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({"step": step}, place / name)
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        finish(place)
    return tmp_path


def flip(path, at: bytes = b"step") -> None:
    content = bytearray(path.read_bytes())
    place = content.find(at)
    content[place] ^= 1
    path.write_bytes(content)


def empty_pickle(path):
    """The archive as it was, but for the pickle inside; the mark has no size of it."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, b"" if name.endswith("data.pkl") else value)
    (path.parent / FINISHED).write_text("{}")


DAMAGES = {
    "weights gone, a mark without sizes": lambda place: (
        (place / FINISHED).write_text("{}"),
        (place / "trainable.safetensors").unlink(),
    ),
    "an empty mark": lambda place: (place / FINISHED).write_text(""),
    "a mark that is a list": lambda place: (place / FINISHED).write_text("[]"),
    "a mark that is half a character": lambda place: (place / FINISHED).write_bytes(b"\xc3"),
    "a mark with a size in words": lambda place: (place / FINISHED).write_text('{"optimizer.pt": "much"}'),
    "a mark of files elsewhere": lambda place: (place / FINISHED).write_text('{"../../../nothing": 3}'),
    "a state that is a list": lambda place: (place / "trainer_state.json").write_text("[]"),
    "an optimiser with another bit": lambda place: flip(place / "optimizer.pt"),
    "an empty pickle in a whole archive": lambda place: empty_pickle(place / "optimizer.pt"),
    "a header of the optimiser with another bit": lambda place: flip(place / "optimizer.pt", b"PK"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way(stage, damage, caplog):
    DAMAGES[damage](stage / "checkpoints" / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        drop_damaged(stage)
    assert last_checkpoint(stage) == str(stage / "checkpoints" / "checkpoint-1")
    assert "checkpoint-2 is damaged" in caplog.text


@pytest.mark.parametrize("value", [10**80, -(10**80), float("nan"), "1", None, True])
def test_a_number_that_numpy_does_not_know_is_none(value):
    assert misfit(value, Finite)
    assert not misfit(3, Finite) and not misfit(0.5, Finite)


def test_folders_beside_checkpoints_are_none(stage):
    (stage / "checkpoints" / "checkpoint-best").mkdir()
    (stage / "checkpoints" / "checkpoint-best" / FINISHED).write_text("{}")
    assert last_checkpoint(stage) == str(stage / "checkpoints" / "checkpoint-2")


def test_a_log_keeps_every_line_that_is_whole(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1 / step}).encode() for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_bytes(
        b"\n".join([lines[0], b"\xc3", b"[]", lines[1], b'{"step": 4}', lines[2][:-4]])
    )
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2]
    assert logged(tmp_path / "nowhere") == []


def test_a_seal_is_of_all_values():
    values = sealed({"rows": 3, "parts": [{"a": 1.5}], "names": {2: 1, 10: 2}})
    read = json.loads(json.dumps(values))
    assert not has_broken_seal(read) and has_broken_seal({"rows": 3})
    assert has_broken_seal({**read, "rows": 4})


@pytest.mark.parametrize("value", [1e101, -1e308, 10**200])
def test_a_number_beyond_its_limit_is_told_in_a_short_sentence(value):
    told = misfit({"loss": value}, dict[str, Finite])
    assert told.startswith("loss: ") and len(told) < 120
