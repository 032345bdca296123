"""Bad input: one sentence, exit code 2, nothing harmed. And what the commands say about themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FEW_STEPS, run_command
from families import FAMILIES, random_teacher
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Gemma3TextConfig, Olmo2Config, Qwen2_5_VLConfig, Qwen2AudioConfig, T5Config
from typer.main import get_command

from flashmorph.cli import app
from flashmorph.runfolder import RunFolder


def refused(capsys, *arguments) -> str:
    """The one sentence of a refused command."""
    assert run_command(*arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    errors = [line for line in printed.err.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


def broken_copy(teacher: Path, folder: Path) -> Path:
    shutil.copytree(teacher, folder)
    return folder


def test_teachers_that_cannot_be_read(capsys, tmp_path, teacher_folder):
    output = tmp_path / "out"
    assert "no folder" in refused(capsys, "morph", tmp_path / "missing", "--output", output)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refused(capsys, "morph", empty, "--output", output)
    bare = broken_copy(teacher_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(capsys, "morph", bare, "--output", output)
    cut = broken_copy(teacher_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    assert "cannot be read" in refused(capsys, "transplant", cut, "--output", output)
    other = broken_copy(teacher_folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 99}))
    assert "qwen3" in refused(capsys, "transplant", other, "--output", output)
    unknown = broken_copy(teacher_folder, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "nothing_like_it"}))
    assert "cannot be read" in refused(capsys, "transplant", unknown, "--output", output)
    assert not output.exists()


OTHER_KINDS = {
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised (quantization_config)"),
    "an encoder": (BertConfig(architectures=["BertForMaskedLM"]), "no causal language model but BertForMaskedLM"),
    "an encoder without a head": ({"architectures": ["Qwen3Model"]}, "no causal language model but Qwen3Model"),
    "a classifier": ({"architectures": ["Qwen3ForSequenceClassification"]}, "no causal language model"),
    "an encoder-decoder": (T5Config(architectures=["T5ForConditionalGeneration"]), "no causal language model but T5"),
    "vision and language": (
        Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"]),
        "a multimodal checkpoint (Qwen2_5_VLForConditionalGeneration, with vision_config)",
    ),
    "audio and language": (Qwen2AudioConfig(), "a multimodal checkpoint (qwen2_audio, with audio_config)"),
    "remote code only": (
        {
            "model_type": "nobodys_own",
            "architectures": ["NobodysForCausalLM"],
            "auto_map": {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"},
        },
        "needs modelling code of its own (NobodysForCausalLM",
    ),
    "OLMo2": (Olmo2Config(architectures=["Olmo2ForCausalLM"]), "no exact host (its norms stand behind attention"),
    "Gemma3": (Gemma3TextConfig(architectures=["Gemma3ForCausalLM"]), "no exact host (it has norms before and behind"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("command", ["morph", "transplant"])
def test_teachers_of_other_kinds(capsys, monkeypatch, tmp_path, teacher_folder, kind, command):
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a question was asked"))
    folder = broken_copy(teacher_folder, tmp_path / "other")
    values, says = OTHER_KINDS[kind]
    if isinstance(values, dict):
        values = json.loads((folder / "config.json").read_text()) | values
    else:
        values = values.to_dict()
    (folder / "config.json").write_text(json.dumps(values))
    sentence = refused(capsys, command, folder, "--output", tmp_path / "out")
    assert says in sentence
    assert not (tmp_path / "out").exists()


def test_code_beside_a_checkpoint_that_transformers_knows_is_not_run(tmp_path, teacher_folder):
    folder = broken_copy(teacher_folder, tmp_path / "with_code")
    (folder / "modeling.py").write_text("raise SystemExit('this was run')")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    assert run_command("transplant", folder, "--output", tmp_path / "host") == 0
    assert "auto_map" not in json.loads((tmp_path / "host" / "config.json").read_text())


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path, teacher_folder, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a question was asked"))
    folder = broken_copy(teacher_folder, tmp_path / "with_code")
    (folder / "tokenization.py").write_text("raise SystemExit('this was run')")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run_command("align", folder, "--recipe", "demo", "--output", tmp_path / "out", "--set", "evaluate.length=9999999")
    assert "this was run" not in "".join(capsys.readouterr())


def test_a_pickled_checkpoint_is_refused(tmp_path, teacher_folder, capsys):
    folder = broken_copy(teacher_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "only pickled ones, which are not read" in refused(
        capsys, "transplant", folder, "--output", tmp_path / "out"
    )


def test_a_recipe_cannot_run_code(tmp_path, teacher_folder, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"budget: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert "not valid YAML" in refused(capsys, "morph", teacher_folder, "--output", tmp_path / "out", "--recipe", file)
    options = ("--set", f"budget=!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert "not valid YAML" in refused(capsys, "morph", teacher_folder, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "made").exists()


def test_two_runs_at_once_in_one_folder(tmp_path, teacher_folder, recipe_file, capsys):
    held = RunFolder(tmp_path / "out")
    sentence = refused(capsys, "morph", teacher_folder, "--output", tmp_path / "out", "--recipe", recipe_file)
    assert "another run is at work" in sentence
    del held


def test_trackers_that_are_not_there_are_told_before_anything_is_made(
    tmp_path, teacher_folder, recipe_file, capsys, monkeypatch
):
    monkeypatch.setattr("flashmorph.outlook.find_spec", lambda name: None)
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--set")
    assert "pip install wandb" in refused(capsys, "morph", teacher_folder, *options, "report_to=[wandb]")
    assert "tensorboard" in refused(capsys, "morph", teacher_folder, *options, "report_to=[tensorbored]")
    assert not (tmp_path / "out").exists()


def test_teachers_whose_parts_do_not_fit(capsys, tmp_path, teacher_folder):
    output = tmp_path / "out"
    small = broken_copy(teacher_folder, tmp_path / "small")
    weights = load_file(small / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, small / "model.safetensors", {"format": "pt"})
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 100}
    (small / "config.json").write_text(json.dumps(config))
    assert "1,536 tokens and the model only 100" in refused(capsys, "transplant", small, "--output", output)
    damaged = broken_copy(teacher_folder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    sentence = refused(capsys, "transplant", damaged, "--output", output)
    assert "model.layers.1.mlp.up_proj.weight" in sentence and "not finite" in sentence
    missing = broken_copy(teacher_folder, tmp_path / "missing_weight")
    weights = load_file(missing / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, missing / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.self_attn.k_proj.weight" in refused(capsys, "transplant", missing, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize("budget, says", [("0", "keeps nothing"), ("2", "everything full"), ("9", "everything full"),
                                          ("100%", "everything full"), ("many", "none of"), ("kv=4@2", "none of"),
                                          ("loss=1%", "tolerance")])  # fmt: skip
def test_budgets_that_leave_no_choice(capsys, tmp_path, teacher_folder, recipe_file, budget, says):
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--budget", budget)
    assert says in refused(capsys, "morph", teacher_folder, *options)
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_used(capsys, tmp_path, teacher_folder, recipe_file):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for command in ("morph", "transplant"):
        options = ("--recipe", recipe_file) if command == "morph" else ()
        assert "holds something" in refused(capsys, command, teacher_folder, "--output", taken, *options)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    below_a_file = taken / "thesis.txt" / "out"
    assert "cannot write" in refused(capsys, "morph", teacher_folder, "--output", below_a_file, "--recipe", recipe_file)
    assert "cannot write" in refused(capsys, "transplant", teacher_folder, "--output", below_a_file)
    assert (taken / "thesis.txt").read_text() == "years of work"


def test_recipes_that_are_broken(capsys, tmp_path, teacher_folder):
    options = ("morph", teacher_folder, "--output", tmp_path / "out", "--recipe")
    assert "there is no recipe" in refused(capsys, *options, tmp_path / "none.yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text("budget: [")
    assert "not valid YAML" in refused(capsys, *options, file)
    file.write_text("- a list")
    assert "mapping" in refused(capsys, *options, file)
    file.write_text(yaml.safe_dump({**FEW_STEPS, "distil": {}}))
    assert "did you mean 'distill'" in refused(capsys, *options, file)
    file.write_text(yaml.safe_dump(FEW_STEPS))
    assert "did you mean 'align.tokens'" in refused(capsys, *options, file, "--set", "align.token=5")
    assert "align.tokens" in refused(capsys, *options, file, "--set", "align.tokens=-5")
    assert "key=value" in refused(capsys, *options, file, "--set", "align.tokens")
    assert "did you mean 'greedy-forward'" in refused(capsys, *options, file, "--strategy", "greedy")
    assert "no setting 'stepps'" in refused(capsys, *options, file, "--set", "select.settings.stepps=3")
    assert "limit is 512" in refused(capsys, *options, file, "--set", "evaluate.length=4096")
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_small(capsys, tmp_path, teacher_folder, recipe_file):
    text = tmp_path / "text.txt"
    text.write_text("a few words\n" * 3)
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--data", text)
    sentence = refused(capsys, "align", teacher_folder, *options)
    assert "too small" in sentence or "no text for the split" in sentence


def test_select_without_a_run(capsys, tmp_path, teacher_folder):
    options = ("--from", tmp_path / "none", "--output", tmp_path / "plan.json")
    assert "flashmorph align" in refused(capsys, "select", teacher_folder, *options)


def test_transplant_works_without_a_tokenizer_and_keeps_the_dtype(capsys, tmp_path, teacher_folder):
    bare = broken_copy(teacher_folder, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert run_command("transplant", bare, "--output", tmp_path / "host") == 0
    assert "Qwen3_5ForCausalLM" in capsys.readouterr().out
    assert {weight.dtype for weight in load_file(tmp_path / "host" / "model.safetensors").values()} == {torch.bfloat16}
    assert not list((tmp_path / "host").glob("tokenizer*"))
    assert "has no tokenizer" in refused(capsys, "align", bare, "--recipe", "demo", "--output", tmp_path / "run")


def test_every_command_helps_with_an_example(capsys):
    commands = get_command(app).commands
    assert {"morph", "transplant", "align", "select", "build", "distill", "extend", "evaluate"} <= set(commands)
    for name in commands:
        assert run_command(name, "--help") == 0
        assert f"flashmorph {name}" in " ".join(capsys.readouterr().out.split())


def test_hosts_lists_every_family_and_what_serves_it(capsys):
    assert run_command("hosts", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {family for host in found["hosts"] for family in host["teachers"]} == set(FAMILIES)
    assert not {family for host in found["hosts"] for family in host["teachers"]} & set(found["refused"])
    for host in found["hosts"]:
        assert host["serves"][0]["name"] == "transformers"
        assert all(engine["version"] and engine["known"] for engine in host["serves"])
        assert all(setting["about"] for setting in host["settings"].values())
    assert run_command("hosts") == 0
    printed = capsys.readouterr().out
    assert all(family in printed for family in (*FAMILIES, *found["refused"]))
    assert "host.mamba_expand=2" in printed


def test_a_setting_of_the_host_reaches_the_checkpoint(capsys, tmp_path):
    random_teacher("llama: multi-head, linear").save_pretrained(tmp_path / "llama")
    capsys.readouterr()
    options = ("transplant", tmp_path / "llama", "--output", tmp_path / "host", "--set")
    assert "must be 1 or 2" in refused(capsys, *options, "host.mamba_expand=3")
    assert "it has mamba_expand" in refused(capsys, *options, "host.expand=1")
    assert not (tmp_path / "host").exists()
    assert "settings of the host only" in refused(capsys, *options, "budget=1")
    assert run_command(*options, "host.mamba_expand=1") == 0
    assert json.loads((tmp_path / "host" / "config.json").read_text())["mamba_expand"] == 1


def test_env_names_versions_device_and_kernels(capsys):
    assert run_command("env", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert "torch_chunk_gated_delta_rule" in facts
