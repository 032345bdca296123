"""Recipes as files: what a user's own starts from, how it is printed, and what is said of it before a run."""

import json
import shutil
from importlib.resources import files

import pytest
import yaml
from conftest import FEW_STEPS, run_command, tiny_tokenizer
from families import random_teacher
from test_cli import refused
from transformers import Qwen3Config

from flashmorph.errors import UserError
from flashmorph.recipe.fitting import fit
from flashmorph.recipe.notices import notices
from flashmorph.recipe.recipe import Recipe, load_recipe
from flashmorph.recipe.source import SHIPPED, recipe_text
from flashmorph.run.open import of_data
from flashmorph.stages import DistillSettings

GROUPS = ("tasks", "data", "align", "select", "distill", "extend", "evaluate")
WHOLE = yaml.safe_dump({name: FEW_STEPS[name] for name in GROUPS if name != "data"})


@pytest.fixture
def own(tmp_path):
    """Writes a recipe of one's own."""

    def write(text: str):
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_whole(name, own):
    """So its values are those of its file alone, wherever that lies."""
    text, _ = recipe_text(name)
    shipped = load_recipe(name)
    assert shipped == Recipe.model_validate(yaml.safe_load(text)) and not shipped.of_default and not shipped.given
    for written in (text, shipped.to_yaml(), json.dumps(shipped.model_dump(mode="json"))):
        copy = load_recipe(own(written))
        assert copy.model_dump() == shipped.model_dump() and not copy.of_default
        assert {"align.tokens", "evaluate.length"} <= copy.given


def test_a_file_starts_from_default(own):
    recipe = load_recipe(own("budget: 7\n"))
    assert recipe.model_dump() == load_recipe("default", {"budget": "7"}).model_dump()
    assert recipe.of_default == GROUPS and recipe.given == {"budget"}
    assert load_recipe(own("{}")).model_dump() == load_recipe("default").model_dump()


def test_a_group_that_a_file_has_is_its_own(own):
    recipe = load_recipe(own("distill: {tokens: 20000000}\nselect: {strategy: race}\nextend: null\n"))
    assert recipe.distill == DistillSettings(tokens=20_000_000)
    assert recipe.select.settings == {} and recipe.extend is None
    assert recipe.of_default == ("tasks", "data", "align", "evaluate")
    assert recipe.align == load_recipe("default").align and "align.tokens" not in recipe.given


def test_single_changes_are_made_to_what_default_has(own):
    changes = {"align.tokens": 1_000_000, "select.strategy": "race", "data.source": "texts"}
    recipe = load_recipe(own("budget: 2"), changes)
    assert recipe.align == load_recipe("default", {"align.tokens": 1_000_000}).align
    assert (recipe.select.strategy, recipe.select.settings) == ("race", {})
    assert "data" not in recipe.of_default and {*changes, "budget"} <= recipe.given


def test_contexts_of_default_are_capped_and_ones_own_are_not(own):
    config = random_teacher("llama", max_position_embeddings=2_048).config
    assert fit(load_recipe(own("budget: 1")), config)[0].evaluate.length == 2_048
    recipe = load_recipe(own("evaluate: {length: 4096}"))
    assert fit(recipe, config)[0].evaluate.length == 4_096


def test_a_misspelt_group_is_no_group_that_is_left_out(own):
    with pytest.raises(UserError, match="unknown setting 'evalute'; did you mean 'evaluate'"):
        load_recipe(own("evalute: {length: 64}"))


def test_what_a_file_leaves_out_is_said(own, teacher_folder, tmp_path, capsys):
    path = own(yaml.safe_dump({name: value for name, value in FEW_STEPS.items() if name not in ("align", "extend")}))
    options = (teacher_folder, "--recipe", path, "--set", "extend.tokens=512", "--set", "align.tokens=512")
    small = ("--set", "align.batch_tokens=512", "--set", "extend.length=64", "--set", "extend.batch_tokens=64")
    assert run_command("morph", *options, *small, "--output", tmp_path / "run", "--dry-run") == 0
    line = "the recipe leaves out align and extend: taken from `default` (`flashmorph recipe default` prints it)"
    assert line in capsys.readouterr().out.splitlines()
    assert run_command("estimate", *options, *small, "--json") == 0
    printed = capsys.readouterr()
    assert line in printed.err.splitlines() and json.loads(printed.out)["stages"]


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_it_is_said_before_a_setting_of_default_is_refused(own, dry, tmp_path, capsys):
    """`tiny` has 512 tokens, too few for a task of `default` that the file does not name."""
    line = "the recipe leaves out tasks, data, align, select, distill, extend and evaluate"
    assert run_command("morph", "tiny", "--recipe", own("budget: 2"), "--output", tmp_path / "run", *dry) == 2
    printed = capsys.readouterr()
    assert line in printed.out and "ten_keys_all" in printed.err
    assert "select.search.length 1,024-16,384 -> 512, " in printed.out


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_printed_as_it_was_written(name, capsys):
    assert run_command("recipe", name) == 0
    printed = capsys.readouterr().out
    assert printed == (files("flashmorph") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8") and "# " in printed
    assert run_command("recipe", name, "--json") == 0
    assert Recipe.model_validate(json.loads(capsys.readouterr().out)) == load_recipe(name)


def test_a_recipe_of_ones_own_is_printed_as_it_stands_and_with_all_that_it_comes_to(own, capsys):
    path = own("budget: 7  # Of 28.\n")
    assert run_command("recipe", path) == 0
    assert capsys.readouterr().out == "budget: 7  # Of 28.\n"
    assert run_command("recipe", path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == load_recipe(path).model_dump(mode="json")
    assert "there is no recipe 'chart'" in refused(capsys, "recipe", "chart")
    assert "unknown setting 'evalute'" in refused(capsys, "recipe", own("evalute: {}"), "--json")


def test_a_teacher_that_follows_instructions_is_not_given_web_text_without_a_word(own, tmp_path):
    """Not where there are conversations, or may be; and not twice what is set already."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    talk = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So it is."}]
    talks, plain = tmp_path / "talks.jsonl", tmp_path / "plain.txt"
    talks.write_text(json.dumps({"messages": talk}) + "\n")
    plain.write_text("So it is.")

    def said(recipe, changes=None, stages=("align", "distill"), tokenizer=tokenizer) -> str:
        return "\n".join(notices(load_recipe(recipe, changes), Qwen3Config(), tokenizer, stages))

    assert "so the hybrid is of our own type" in said("chat", {"host.mixers": "full,window"})
    for line in (said("default"), said("laptop"), said("default", of_data(str(plain)))):
        assert "--recipe chat mixes conversations in" in line
        assert "--set chat_template=true --set evaluate.chat_template=true asks questions" in line
    half = said("default", {"chat_template": True})
    assert "in; --set evaluate.chat_template=true asks" in half and " chat_template=true" not in half
    both = {"chat_template": True, "evaluate.chat_template": True}
    assert said("default", both).endswith("--recipe chat mixes conversations in")
    for recipe, changes in (
        ("chat", {}),
        ("default", of_data(str(talks))),
        ("default", of_data("org/of-ones-own")),
        ("default", {"data.column": "messages"}),
        (own("data: {mixture: [{source: demo, weight: 1}, {source: org/talks, weight: 1}]}\n" + WHOLE), {}),
    ):
        assert said(recipe, changes) == ""
    assert said("default", stages=("select", "evaluate")) == said("default", tokenizer=None) == ""
    assert said("demo", tokenizer=tiny_tokenizer()) == ""


def test_it_is_said_once_before_a_run(teacher_folder, recipe_file, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    (teacher / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    for options in (("morph", "--dry-run"), ("distill", "--layers", "0", "--set", "distill.tokens=128")):
        command, *more = options
        assert run_command(command, teacher, "--recipe", recipe_file, "--output", tmp_path / "run", *more) == 0
        assert capsys.readouterr().out.count("--recipe chat mixes conversations in") == 1
