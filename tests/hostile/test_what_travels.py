"""Of a teacher's folder only known files travel, and nothing in them chooses code."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_command
from transformers import AutoTokenizer, Qwen3Config

from flashmorph.convert.checkpoint import travelling_files
from flashmorph.convert.load import load_config, load_model, load_tokenizer
from flashmorph.convert.save import bring, replace_checkpoint
from flashmorph.convert.teacher import open_teacher
from flashmorph.errors import UserError
from flashmorph.hosts.build import without_weights
from hostile.teachers import copy_of

CODE = "open({!r}, 'w').close()\nclass T: pass\n"


@pytest.fixture
def teacher(tmp_path) -> Path:
    return copy_of("qwen3", tmp_path / "t")


def set_in(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def no_kernels(monkeypatch):
    """Every way to a kernel of the hub fails, loudly."""

    def fetched(*arguments, **options):
        raise AssertionError(f"a kernel was asked for: {arguments}")

    for name in ("transformers.modeling_utils.lazy_import_flash_attention",
                 "transformers.integrations.hub_kernels.get_kernel"):  # fmt: skip
        monkeypatch.setattr(name, fetched)
    return fetched


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("kernel", ["kernels-community/x", "owner/repo", "owner/repo:f", "flash_attention_2"])
def test_a_configuration_chooses_no_kernel(teacher, no_kernels, name, kernel):
    set_in(teacher / "config.json", **{name: kernel})
    model = load_model(teacher, torch.float32)
    assert model.config._attn_implementation == "sdpa"
    assert load_config(teacher)._attn_implementation is None
    model.save_pretrained(teacher.parent / "again")
    assert kernel not in (teacher.parent / "again" / "config.json").read_text()


def test_a_configuration_in_memory_chooses_none_either(no_kernels):
    config = Qwen3Config(hidden_size=32, num_hidden_layers=1, vocab_size=50, attn_implementation="owner/repo")
    assert without_weights(config).config._attn_implementation == "sdpa"
    assert config._attn_implementation == "owner/repo"


def test_what_computes_experts_is_not_chosen_either(tmp_path):
    folder = copy_of("qwen3_moe", tmp_path / "t")
    usual = load_model(folder, torch.float32).config._experts_implementation
    set_in(folder / "config.json", _experts_implementation="owner/repo")
    assert load_model(folder, torch.float32).config._experts_implementation == usual


def test_code_of_the_teachers_is_neither_run_nor_written(teacher, tmp_path):
    (teacher / "code.py").write_text(CODE.format(str(tmp_path / "ran")))
    set_in(teacher / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.T"]})
    set_in(teacher / "config.json", auto_map={"AutoConfig": "code.T", "AutoModelForCausalLM": "code.T"})
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    assert run_command("transplant", teacher, "--output", tmp_path / "host") == 0
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "host").glob("*.py"))
    assert "auto_map" not in "".join(path.read_text() for path in (tmp_path / "host").glob("*.json"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "host")) == len(load_tokenizer(teacher))
    assert before == {path.name: path.read_bytes() for path in teacher.iterdir()}
    (tmp_path / "host" / "code.py").write_text("")
    replace_checkpoint(tmp_path / "run", tmp_path / "host", teacher)
    assert not list((tmp_path / "run").glob("*.py"))
    assert "auto_map" not in (tmp_path / "run" / "tokenizer_config.json").read_text()


def test_the_words_that_name_code_are_no_part_of_what_makes_tokens(teacher):
    before = open_teacher(str(teacher)).tokenizer_digest
    set_in(teacher / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.T"]})
    assert open_teacher(str(teacher)).tokenizer_digest == before
    set_in(teacher / "tokenizer_config.json", model_max_length=77)
    assert open_teacher(str(teacher)).tokenizer_digest != before


def test_what_was_brought_is_not_written_again(teacher, tmp_path):
    set_in(teacher / "tokenizer_config.json", auto_map={})
    bring(teacher, tmp_path / "model")
    before = (tmp_path / "model" / "tokenizer_config.json").stat().st_mtime_ns
    os.utime(teacher / "tokenizer_config.json")
    bring(teacher, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer_config.json").stat().st_mtime_ns == before


STRANGERS = ["tokenizer_secret.txt", "tokenizer_notes.json", "tokenizer.model.py", "xtokenizer.json", "tokenizerXjson",
             "chat_template_old.jinja", "setup.sh", "tokenizer.model.v"]  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_file_stays_where_it_is(teacher, tmp_path, name):
    before = travelling_files(teacher)
    (tmp_path / "secret").write_text("secret")
    (teacher / name).symlink_to(tmp_path / "secret")
    assert travelling_files(teacher) == before


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.model.v3", "special_tokens_map.json"])
def test_a_link_leads_into_the_hubs_cache_or_is_refused(teacher, tmp_path, name):
    for place in (tmp_path / "blobs", tmp_path / "elsewhere"):
        place.mkdir()
        (place / "0").write_text("x")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.parent.mkdir()
    teacher.rename(snapshot)
    (snapshot / name).symlink_to(Path("..", "..", "blobs", "0"))
    assert snapshot / name in travelling_files(snapshot)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(Path("..", "..", "elsewhere", "0"))
    with pytest.raises(UserError, match="out of the checkpoint"):
        travelling_files(snapshot)
    with pytest.raises(UserError, match="out of the checkpoint"):
        open_teacher(str(snapshot))


def test_a_file_that_is_far_too_large_is_none_of_a_tokenizers(teacher):
    with (teacher / "vocab.txt").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(UserError, match="no file of a tokenizer"):
        travelling_files(teacher)
