"""What lies in a checkpoint's folder: what travels, what stops nothing, what is not what its name says."""

import copy
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import run_command, tiny_tokenizer
from families import ONE_FOR_EACH_HOST, random_teacher
from safetensors.torch import load_file, save_file
from test_cli import refused
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flashmorph.convert import load
from flashmorph.convert.checkpoint import travelling_files, weight_files
from flashmorph.convert.digests import weights_digest
from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model, load_tokenizer
from flashmorph.convert.save import replace_checkpoint, save_model
from flashmorph.convert.teacher import open_teacher
from flashmorph.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4\n".format("0" * 64)


@pytest.fixture
def teacher(tmp_path) -> Path:
    return a_teacher(tmp_path / "teacher")


def a_teacher(folder: Path, seed: int = 0, **options) -> Path:
    tokenizer = tiny_tokenizer()
    random_teacher("qwen3: grouped", seed, vocab_size=len(tokenizer)).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def test_everything_that_a_tokenizer_needs_travels(teacher, tmp_path):
    for name in ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json",
                 "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "qwen.tiktoken"):  # fmt: skip
        (teacher / name).write_text("")
    (teacher / "additional_chat_templates").mkdir()
    (teacher / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    for name in ("training_args.bin", "README.md", "eval.json", "consolidated.safetensors", "tokenizer_notes.md"):
        (teacher / name).write_text("")
    found = [path.relative_to(teacher).as_posix() for path in travelling_files(teacher)]
    expected = {"tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json",
                "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "qwen.tiktoken",
                "additional_chat_templates/tool_use.jinja", "tokenizer.json", "tokenizer_config.json",
                "generation_config.json"}  # fmt: skip
    assert found == sorted(found) and set(found) == expected


def test_named_templates_arrive_where_the_tokenizer_finds_them(teacher, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(teacher)
    assert (teacher / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert run_command("transplant", teacher, "--output", tmp_path / "host") == 0
    assert load_tokenizer(tmp_path / "host").chat_template == tokenizer.chat_template


def test_weights_may_be_read_by_whoever_may_read_their_configuration(teacher, tmp_path):
    host, other = tmp_path / "host", tmp_path / "other"
    assert run_command("transplant", teacher, "--output", host) == 0
    save_model(load_model(host, torch.float32), other, host)
    for folder in (host, other):
        mode = (folder / "config.json").stat().st_mode
        assert (folder / "model.safetensors").stat().st_mode == mode, folder


def test_a_teacher_that_nobody_may_write_moves(teacher, tmp_path):
    for path in teacher.iterdir():
        path.chmod(0o444)
    assert run_command("transplant", teacher, "--output", tmp_path / "host") == 0
    assert os.stat(tmp_path / "host" / "tokenizer_config.json").st_mode & stat.S_IWUSR


def test_other_folders_in_the_teachers_stop_nothing(teacher, tmp_path):
    for name in ("original", "onnx", ".git", "tokenizer.model", "chat_template.jinja", "figures"):
        (teacher / name).mkdir()
        (teacher / name / "params.json").write_text("{}")
    assert run_command("transplant", teacher, "--output", tmp_path / "host") == 0
    assert not [path for path in (tmp_path / "host").iterdir() if path.is_dir()]


def test_links_as_the_hubs_cache_has_them_are_followed(teacher, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    teacher.rename(blobs)
    snapshot.mkdir()
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "blobs", str(number)))
    assert run_command("transplant", snapshot, "--output", tmp_path / "host") == 0
    assert not any(path.is_symlink() for path in (tmp_path / "host").iterdir())
    assert len(load_tokenizer(tmp_path / "host")) == len(tiny_tokenizer())


READ = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("name", READ)
def test_a_dead_link_is_named(teacher, tmp_path, capsys, name):
    (teacher / name).unlink()
    (teacher / name).symlink_to(tmp_path / "gone" / name)
    says = refused(capsys, "transplant", teacher, "--output", tmp_path / "host")
    assert f"{teacher / name} is a link to {tmp_path / 'gone' / name}, which is not there" in says
    assert not (tmp_path / "host").exists()


@pytest.mark.parametrize("name", READ)
def test_a_pointer_of_git_lfs_says_how_to_get_the_file(teacher, tmp_path, capsys, name):
    (teacher / name).write_text(POINTER)
    says = refused(capsys, "transplant", teacher, "--output", tmp_path / "host")
    assert f"{teacher / name} is a git-LFS pointer" in says and f"`git lfs pull` in {teacher}" in says


def test_one_of_several_files_is_named(tmp_path, capsys):
    teacher = a_teacher(tmp_path / "teacher", max_shard_size="8KB")
    path = sorted(teacher.glob("model-*.safetensors"))[2]
    path.write_text(POINTER)
    assert f"{path} is a git-LFS pointer" in refused(capsys, "transplant", teacher, "--output", tmp_path / "host")
    path.unlink()
    path.symlink_to("nowhere")
    assert f"{path} is a link to nowhere" in refused(capsys, "transplant", teacher, "--output", tmp_path / "host")
    with pytest.raises(UserError, match="is a link to nowhere"):
        load_model(teacher, torch.float32)
    assert f"{path} is a link" in refused(capsys, "generate", teacher, "--prompt", "a")


def test_a_dead_link_that_nobody_reads_stops_nothing(teacher, tmp_path):
    (teacher / "README.md").symlink_to("nowhere")
    (teacher / "consolidated.safetensors").symlink_to("nowhere")
    assert run_command("transplant", teacher, "--output", tmp_path / "host") == 0


def no_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")


def adapter_alone(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    adapter(folder)


def fsdp(folder: Path) -> None:
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_text("")


def deepspeed(folder: Path) -> None:
    (folder / "global_step10").mkdir()
    (folder / "global_step10" / "mp_rank_00_model_states.pt").write_text("")


def another_name(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "consolidated.safetensors")


def no_index(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")


def not_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def gguf(folder: Path) -> None:
    (folder / "model-q4.gguf").write_text("")


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (adapter, "is an adapter of some/base, no whole model: merge it into its base first"),
        (adapter_alone, "is an adapter of some/base, no whole model: merge it into its base first"),
        (fsdp, "sharded over processes (FSDP or DeepSpeed)"),
        (deepspeed, "sharded over processes (FSDP or DeepSpeed)"),
        (another_name, "has consolidated.safetensors, but neither model.safetensors nor"),
        (no_index, "lacks model.safetensors.index.json"),
        (not_an_index, "is no index of weights"),
        (gguf, "a GGUF file"),
    ],
)
def test_a_folder_without_whole_weights_says_what_it_is(teacher, tmp_path, capsys, fill, says):
    fill(no_weights(teacher))
    assert says in refused(capsys, "transplant", teacher, "--output", tmp_path / "host")
    with pytest.raises(UserError):
        open_teacher(str(teacher))


def test_weights_are_those_that_transformers_opens(tmp_path):
    """A single file is opened before an index, whatever else lies there."""
    folder = a_teacher(tmp_path / "teacher", 1, max_shard_size="8KB")
    assert len(weight_files(folder)) > 5
    random_teacher("qwen3: grouped", 2, vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    assert weight_files(folder) == [folder / "model.safetensors"]
    opened = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(opened[name], weight) for name, weight in stored.items())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_go_straight_to_a_device_are_the_same(tied, tmp_path, monkeypatch):
    """By the argument that a GPU gets, which is tried on the CPU."""
    random_teacher("qwen3: grouped", 1, tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = load_model(tmp_path, torch.float32)
    assert load._straight_to(torch.device("cpu")) == {} and load._straight_to(None) == {}
    straight = {"device_map": {"": torch.device("cpu")}}
    assert load._straight_to(torch.device("cuda", 1)) == {"device_map": {"": torch.device("cuda", 1)}}
    monkeypatch.setattr(load, "_straight_to", lambda device: straight)
    model = load_model(tmp_path, torch.float32)
    states = [dict(each.state_dict()) | dict(each.named_buffers()) for each in (model, expected)]
    assert states[0].keys() == states[1].keys()
    for name, weight in states[1].items():
        assert weight.dtype == states[0][name].dtype and torch.equal(weight, states[0][name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not hasattr(model, "_hf_hook") and len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1


OWN = ["stages/build/model/config.json", "data/rows.npy", "report.html", "figures/recall.png", "plan.json",
       "README.md", "recipe.yaml", "results.json", "evaluate.json", "notes.txt", "flashmorph.json",
       "tokenizer_notes.md"]  # fmt: skip


def published(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("before, after", [("1GB", "8KB"), ("8KB", "1GB"), ("8KB", "12KB"), ("1GB", "1GB")])
def test_what_is_published_is_the_new_checkpoint_and_nothing_of_the_old(before, after, tmp_path):
    old = a_teacher(tmp_path / "old", 1, max_shard_size=before)
    (old / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "spiece.model", "added_tokens.json"):
        (old / name).write_text("x")
    new, run = a_teacher(tmp_path / "new", 2, max_shard_size=after), tmp_path / "run"
    (new / "additional_chat_templates").mkdir()
    (new / "additional_chat_templates" / "tool_use.jinja").write_text("y")
    for name in OWN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    for source in (old, new, new):
        replace_checkpoint(run, source, source)
        there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        assert there - set(OWN) == {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
        found, expected = published(run), published(source)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all((run / name).read_text() == name for name in OWN)


def test_a_copy_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new, run = (
        a_teacher(tmp_path / "old", 1),
        a_teacher(tmp_path / "new", 2, max_shard_size="8KB"),
        tmp_path / "run",
    )
    replace_checkpoint(run, old, old)
    copy, calls = shutil.copy2, []

    def full(source, target):
        calls.append(source)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(UserError, match="No space left"):
        replace_checkpoint(run, new, new)
    assert {path.name for path in run.iterdir()} == {path.name for path in old.iterdir()}
    assert all(torch.equal(weight, published(old)[name]) for name, weight in published(run).items())


@pytest.mark.parametrize("before, after", [("1GB", "8KB"), ("8KB", "1GB")])
def test_a_kill_before_old_files_are_gone_leaves_one_whole_checkpoint(before, after, tmp_path, monkeypatch):
    old, run = a_teacher(tmp_path / "old", 1, max_shard_size=before), tmp_path / "run"
    new = a_teacher(tmp_path / "new", 2, max_shard_size=after)
    replace_checkpoint(run, old, old)

    def killed(path, missing_ok=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_checkpoint(run, new, new)
    assert isinstance(AutoTokenizer.from_pretrained(run), type(tiny_tokenizer()))
    found = published(run)
    whole = [all(torch.equal(found[name], weight) for name, weight in published(each).items()) for each in (old, new)]
    assert any(whole)
    replace_checkpoint(run, new, new)
    assert all(torch.equal(weight, published(new)[name]) for name, weight in published(run).items())


@pytest.mark.parametrize("case", ONE_FOR_EACH_HOST)
def test_a_hybrid_reads_its_tokenizer_as_the_teacher_does(case, tmp_path):
    """Combining marks too: transformers has a tokenizer class for some model types, whatever the files say."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tiny_tokenizer().backend_tokenizer))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+|[^\p{L}]"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    teacher = random_teacher(case, vocab_size=len(tokenizer))
    teacher.save_pretrained(tmp_path / "teacher")
    transplant(teacher)[0].save_pretrained(tmp_path / "hybrid")
    for name in ("teacher", "hybrid"):
        tokenizer.save_pretrained(tmp_path / name)
    text = "cafe\u0301s, क्षत्रिय in 1984"
    first, second = (load_tokenizer(tmp_path / name)(text).input_ids for name in ("teacher", "hybrid"))
    assert first == second


def test_the_hubs_cache_names_large_files_by_their_content(tmp_path):
    """So the weights of a model of the hub are known without reading all of them; small files have other names."""
    plain, cached = tmp_path / "plain", tmp_path / "models--me--it" / "snapshots" / "0"
    blobs = cached.parent.parent / "blobs"
    for folder in (plain, cached, blobs):
        folder.mkdir(parents=True)
    contents = {"config.json": b"{}", "model.safetensors": bytes(range(256))}
    for name, content in contents.items():
        (plain / name).write_bytes(content)
        sha = hashlib.sha256(content).hexdigest() if name.endswith("safetensors") else hashlib.sha1(content).hexdigest()
        (blobs / sha).write_bytes(content)
        (cached / name).symlink_to(blobs / sha)
    assert weights_digest(plain) == weights_digest(cached)
    blob = (cached / "model.safetensors").resolve()
    blob.write_bytes(b"other")  # It is not read.
    assert weights_digest(plain) == weights_digest(cached)
