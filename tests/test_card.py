"""The model card: metadata that is known and no other, and code that runs as it stands."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import run_command, tiny_tokenizer
from families import random_teacher
from huggingface_hub import ModelCard

import flashmorph
from flashmorph.files import read_json
from flashmorph.pipeline.card import usage
from flashmorph.pipeline.metadata import front_matter, in_words

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def run(teacher_folder, recipe_file, tmp_path):
    """Of a teacher whose folder may be changed."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    return flashmorph.open_run(str(folder), tmp_path / "run", recipe=recipe_file)


def metadata_of(run, card: str) -> dict:
    (run.teacher.folder / "README.md").write_text(card, encoding="utf-8")
    return yaml.safe_load(front_matter(run, ["linear-attention"]))


def of_the_hub(run):
    """The same run, of a teacher of the hub."""
    run.teacher = replace(run.teacher, name="org/teacher", revision="0123abc")
    return run


def test_what_the_teachers_card_has_is_taken(run):
    card = "---\nlicense: apache-2.0\nlanguage: [en]\nlibrary_name: other\ntags: [x]\n---\n# Teacher\n"
    values = metadata_of(of_the_hub(run), card)
    assert values == {
        "base_model": "org/teacher",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["flashmorph", "hybrid-attention", "linear-attention"],
    }
    assert in_words(run) == "Licence: the teacher's, `apache-2.0` by its own card."
    front = f"---\n{front_matter(run, [])}---\n\n# Hybrid\n"
    assert ModelCard(front).data.to_dict()["license"] == "apache-2.0"


def test_a_licence_of_ones_own_keeps_its_name_and_its_link(run):
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: {link}\n---\n"
    elsewhere = "https://example.org/terms"
    assert metadata_of(run, card.format(link=elsewhere))["license_link"] == elsewhere
    values = metadata_of(run, card.format(link="LICENSE"))
    assert values["license_name"] == "qwen" and "license_link" not in values, "the file is not copied"
    values = metadata_of(of_the_hub(run), card.format(link="LICENSE"))
    assert values["license_link"] == "https://huggingface.co/org/teacher/blob/0123abc/LICENSE"


@pytest.mark.parametrize(
    "card",
    [
        "", "# No metadata\n", "---\nlanguage: en\n---\n", "---\nlicense: [a, {b: c}]\n---\n", "---\n- license\n---\n",
        "---\nlicense: [\n---\n", "---\nlicense: |\n  a\n  b\n---\n", "---\nlicense: \"\\x1b[31m\"\n---\n",
        "---\na: &a [x, x]\nlicense: *b\n---\n", f"---\nlicense: {'x' * 1_000}\n---\n", "---\nlicense: ''\n---\n",
    ],
)  # fmt: skip
def test_what_is_not_known_is_said_and_never_made_up(run, card):
    values = metadata_of(run, card)
    assert not {"license", "base_model", "datasets"} & values.keys()
    for said in ("Not known", "`license`", "`base_model`"):
        assert said in in_words(run)
    of_the_hub(run)
    assert "`license`" in in_words(run) and "`base_model`" not in in_words(run)


def test_a_card_that_cannot_be_read_is_none(run):
    card = run.teacher.folder / "README.md"
    card.write_bytes(b"---\nlicense: \xff\n---\n")
    assert "license" not in front_matter(run, [])
    card.unlink()
    card.symlink_to("nowhere")
    assert "license" not in front_matter(run, [])


def test_data_sets_of_the_hub_are_linked_and_local_text_is_not(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x")
    parts = [{"source": name, "weight": 1} for name in ("demo", str(text), "org/texts")]
    run.recipe = flashmorph.load_recipe("default", {"data": {"mixture": parts}})
    assert yaml.safe_load(front_matter(run, []))["datasets"] == ["org/texts"]
    text.unlink()
    assert yaml.safe_load(front_matter(run, []))["datasets"] == ["org/texts"]


@pytest.mark.parametrize(
    "family, template, options",
    [
        ("qwen3: grouped", None, ("--window", 8)),
        ("llama: grouped", TEMPLATE, ("--mixers", "full,window", "--window", 8)),
        ("qwen3_moe: grouped", None, ()),
    ],
)
def test_the_code_in_a_card_runs_where_it_is_written(family, template, options, tmp_path, recipe_file):
    """Without flashmorph, in the folder that the hybrid's folder lies in."""
    teacher, output, tokenizer = tmp_path / "teacher", tmp_path / "out", tiny_tokenizer()
    tokenizer.chat_template = template
    random_teacher(family, vocab_size=len(tokenizer)).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    assert run_command("build", teacher, "--recipe", recipe_file, "--layers", 0, "--output", output, *options) == 0
    (built,) = output.glob("stages/build-*/model")
    own_code, model_type = bool([*built.glob("*.py")]), read_json(built / "config.json")["model_type"]
    code = usage(built, model_type, own_code, bool(template))
    assert ("PreTrainedTokenizerFast" in code) is (family == "qwen3_moe: grouped")
    assert code.count("trust_remote_code=True") == (2 if family == "llama: grouped" else 0)
    alone = f'import sys\nsys.modules["flashmorph"] = None\n{code}\nassert written.ndim == 1 and len(written)\n'
    done = subprocess.run([sys.executable, "-c", alone], cwd=built.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run" not in done.stdout and "model of type" not in done.stderr
