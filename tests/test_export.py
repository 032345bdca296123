"""Export: what is refused before anything is written, what the converter is told, and when its file is not kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from families import config_of
from test_cli import refused

from flashmorph.cli.options import quiet
from flashmorph.convert.load import load_config
from flashmorph.errors import UserError
from flashmorph.hosts import configure
from flashmorph.mixers import LINEAR
from flashmorph.pipeline.export import CONVERTER, card_of, gguf_form, lay_out, require_fields, require_layers
from flashmorph.plan import FULL, Budget, Plan
from flashmorph.run.folder import RunFolder

IRREGULAR = (FULL, LINEAR, LINEAR, FULL, LINEAR)
PERIODIC = (LINEAR, FULL, LINEAR, FULL)
SQUARE = {"head_dim": 8, "vocab_size": 96}
WRITER = "class GGUFWriter:\n    def add_recurrent_layers(self, value):\n        pass\n"
REPORTS = """
import json, pathlib, sys
place = pathlib.Path(__file__).parent
config = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
card = json.loads(pathlib.Path(sys.argv[-1]).read_text())
(place / "told.json").write_text(json.dumps({"arguments": sys.argv[1:], "config": config, "card": card}))
sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
"""


def llama_cpp(folder: Path, converter: str = "", writer: str | None = WRITER) -> Path:
    """A folder with what export looks for in a checkout of llama.cpp; the converter does what it is given."""
    folder.mkdir()
    (folder / CONVERTER).write_text(converter)
    if writer is not None:
        (folder / "gguf-py" / "gguf").mkdir(parents=True)
        (folder / "gguf-py" / "gguf" / "gguf_writer.py").write_text(writer)
    return folder


def hybrid(folder: Path, options=IRREGULAR, teacher: str = "qwen3: wide heads", settings=None, **changes) -> Path:
    """A random hybrid as transformers itself saves it."""
    quiet()
    host, config = configure(config_of(teacher, num_hidden_layers=len(options), **changes), settings)
    host.model_class(host.with_plan(config, list(options))).save_pretrained(folder)
    return folder


def export(run: Path, file: Path, converter: Path, *more) -> tuple:
    return ("export", run, "--gguf", file, "--llama-cpp", converter, *more)


def test_the_converter_is_told_what_the_host_needs(capsys, tmp_path):
    converter, file = llama_cpp(tmp_path / "llama.cpp", REPORTS), tmp_path / "out" / "hybrid.gguf"
    qwen = hybrid(tmp_path / "qwen-hybrid")
    assert "does not know the tokenizer" in refused(capsys, *export(qwen, file, converter))
    told = json.loads((converter / "told.json").read_text())
    source, *rest = told["arguments"]
    assert Path(source).name == "qwen-hybrid" and not Path(source).exists()
    assert rest[0] == "--outfile" and rest[2:-1] == ["--outtype", "f32", "--no-mtp", "--metadata"]
    assert told["config"] == json.loads((qwen / "config.json").read_text()) | {"mamba_ssm_dtype": "float32"}
    llama = hybrid(tmp_path / "llama-hybrid", teacher="llama: grouped", **SQUARE)
    for option in ("--dtype", "--outtype"):
        refused(capsys, *export(llama, file, converter, option, "q8_0"))
        told = json.loads((converter / "told.json").read_text())
        assert told["arguments"][3:-1] == ["--outtype", "q8_0", "--metadata"]
    assert told["config"]["layer_types"] == ["attention", "mamba", "mamba", "attention", "mamba"]
    assert told["config"]["rope_theta"] == 10000.0
    assert json.loads((llama / "config.json").read_text())["layer_types"][0] == "full_attention"
    assert not file.exists() and not any(file.parent.iterdir())


def test_the_file_describes_itself(tmp_path):
    folder = hybrid(tmp_path / "hybrid")
    config = load_config(folder)
    values = card_of(folder, config, IRREGULAR)
    assert values["general.description"].startswith("Hybrid, made by flashmorph")
    assert "layers 0, 3 of 5 keep full attention, the others are Gated DeltaNet." in values["general.description"]
    options = {f"layers.{layer}": option for layer, option in enumerate(IRREGULAR)}
    plan = replace(Plan.of(options, Budget("layers", 2)), strategy="race", teacher="/home/somebody/teacher")
    plan.save(folder / "plan.json")
    values = card_of(folder, config, IRREGULAR)
    assert "Hybrid of teacher, made" in values["general.description"]
    assert "(chosen by race for the budget 2)" in values["general.description"]
    assert "general.base_models" not in values
    replace(plan, teacher="Qwen/Qwen3-1.7B", revision="abc").save(folder / "plan.json")
    assert card_of(folder, config, IRREGULAR)["general.base_models"] == [
        {"name": "Qwen3-1.7B", "organization": "Qwen", "repo_url": "https://huggingface.co/Qwen/Qwen3-1.7B"}
    ]
    assert card_of(folder, config, [FULL] * 5) == {}


def test_types_that_the_converter_does_not_make(capsys, tmp_path):
    converter, file = llama_cpp(tmp_path / "llama.cpp", REPORTS), tmp_path / "hybrid.gguf"
    said = refused(capsys, *export(hybrid(tmp_path / "hybrid"), file, converter, "--dtype", "Q4_K_M"))
    assert "none of f32, bf16, f16, q8_0" in said and "llama-quantize" in said
    assert not (converter / "told.json").exists()


def test_the_copy_has_links_to_everything_but_the_configuration(tmp_path):
    folder = hybrid(tmp_path / "hybrid")
    (folder / "stages").mkdir()
    lay_out(folder, load_config(folder), tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        path.name for path in folder.iterdir() if path.is_file()
    }
    assert (tmp_path / "copy" / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (tmp_path / "copy" / "config.json").is_symlink()


def test_a_file_is_kept_only_with_the_layers_of_the_plan(tmp_path):
    qwen, _ = gguf_form(tmp_path, load_config(hybrid(tmp_path / "qwen")))
    require_layers({"attention.recurrent_layers": [False, True, True, False, True]}, qwen, IRREGULAR)
    by_interval = {"full_attention_interval": 2, "block_count": 4}
    require_layers(by_interval, qwen, PERIODIC)
    with pytest.raises(UserError, match="would run layers 3 as full ones, the hybrid has 0, 3 of 5"):
        require_layers({"full_attention_interval": 4, "block_count": 5}, qwen, IRREGULAR)
    with pytest.raises(UserError, match="would run layers 1, 3"):
        require_layers({**by_interval, "attention.recurrent_layers": [True, False] * 2}, qwen, (FULL, *PERIODIC[1:]))
    llama, _ = gguf_form(tmp_path, load_config(hybrid(tmp_path / "llama", teacher="llama: grouped", **SQUARE)))
    require_layers({"attention.head_count_kv": [2, 0, 0, 2, 0]}, llama, IRREGULAR)
    with pytest.raises(UserError, match="would run layers none as full"):
        require_layers({"attention.head_count_kv": [0] * 5}, llama, IRREGULAR)


def test_a_file_must_say_what_the_engine_would_guess_wrongly(tmp_path):
    config = load_config(hybrid(tmp_path / "llama", teacher="llama: grouped", **SQUARE))
    wanted = gguf_form(tmp_path, config)[0].fields(config)
    assert wanted == {"rope.scaling.finetuned": True, "context_length": 512}
    require_fields({**wanted, "block_count": 5}, wanted)
    with pytest.raises(UserError, match="no field rope.scaling.finetuned, which must be True"):
        require_fields({"context_length": 512}, wanted)


def test_what_llama_cpp_would_run_as_something_else(capsys, tmp_path):
    converter, file = llama_cpp(tmp_path / "llama.cpp", REPORTS), tmp_path / "hybrid.gguf"

    def says(folder: str, *arguments, **options) -> str:
        return refused(capsys, *export(hybrid(tmp_path / folder, *arguments, **options), file, converter))

    assert "at least one linear layer" in says("full", (FULL, FULL))
    sliding = {"settings": {"window": 16}}
    assert "every layer full" in says("window", (FULL, "sliding"), **sliding)
    expand = {"teacher": "llama: grouped", **SQUARE, "settings": {"mamba_expand": 1}}
    assert "mamba_expand 2" in says("expand", **expand)
    assert "hidden size and a vocabulary" in says("wide", teacher="llama: grouped", vocab_size=96)
    assert "vocabulary divisible by 8" in says("odd", teacher="llama: grouped", head_dim=8)
    assert "rope that is not scaled" in says("scaled", teacher="qwen3: yarn", head_dim=32)
    assert "heads of 32 or more, no biases" in says("biased", teacher="qwen3: bias", head_dim=32)
    assert "heads of 32 or more" in says("narrow", teacher="qwen3: grouped")
    assert not (converter / "told.json").exists()
    other = tmp_path / "other"
    config_of("llama: grouped").save_pretrained(other)
    assert "is no host of flashmorph's" in refused(capsys, *export(other, file, converter))
    assert "no config.json" in refused(capsys, *export(tmp_path, file, converter))


def test_a_run_without_a_hybrid(capsys, tmp_path):
    run = RunFolder(tmp_path / "run").path
    assert "has no hybrid yet" in refused(capsys, *export(run, tmp_path / "x.gguf", tmp_path))


def test_converters_that_are_missing_or_too_old(capsys, tmp_path, monkeypatch):
    irregular, file = hybrid(tmp_path / "irregular"), tmp_path / "hybrid.gguf"
    assert f"has no {CONVERTER}" in refused(capsys, *export(irregular, file, tmp_path))
    old = llama_cpp(tmp_path / "old", REPORTS, writer="class GGUFWriter:\n    pass\n")
    assert "too old for a plan" in refused(capsys, *export(irregular, file, old))
    assert not (old / "told.json").exists()
    refused(capsys, *export(hybrid(tmp_path / "periodic", PERIODIC), file, old))
    assert (old / "told.json").exists()
    bare = llama_cpp(tmp_path / "bare", writer=None)
    monkeypatch.setattr("flashmorph.pipeline.export.importlib.util.find_spec", lambda name: None)
    assert "needs the package gguf" in refused(capsys, *export(irregular, file, bare))
    broken = llama_cpp(tmp_path / "broken", "import a_package_that_nobody_has")
    assert "needs the package 'a_package_that_nobody_has'" in refused(capsys, *export(irregular, file, broken))
    failing = llama_cpp(tmp_path / "failing", "raise SystemExit('ERROR: Model Qwen3_5ForCausalLM is not supported')")
    assert "failed: ERROR: Model Qwen3_5ForCausalLM" in refused(capsys, *export(irregular, file, failing))


def test_a_file_that_is_there_is_replaced_only_by_force_and_only_by_a_whole_one(capsys, tmp_path):
    converter, run = llama_cpp(tmp_path / "llama.cpp", REPORTS), hybrid(tmp_path / "run")
    file = tmp_path / "hybrid.gguf"
    file.write_text("an hour's work")
    assert "already there; give another file, or --force" in refused(capsys, *export(run, file, converter))
    refused(capsys, *export(run, file, converter, "--force"))
    assert file.read_text() == "an hour's work"
    assert "is a folder" in refused(capsys, *export(run, tmp_path, converter))
    assert "cannot write" in refused(capsys, *export(run, file / "below.gguf", converter))
    assert not list(tmp_path.glob(".*.part"))
