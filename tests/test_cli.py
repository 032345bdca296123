"""Bad input: one sentence, exit code 2, nothing harmed. And what the commands say about themselves."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FEW_STEPS, run_command
from families import FAMILIES, random_teacher
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Gemma3TextConfig, Olmo2Config, Qwen2_5_VLConfig, Qwen2AudioConfig, T5Config
from typer.main import get_command

from flashmorph.cli import app
from flashmorph.recipe.recipe import Recipe, load_recipe, parse_changes
from flashmorph.run.folder import RunFolder


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
    monkeypatch.setattr("flashmorph.recipe.outlook.find_spec", lambda name: None)
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


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("", "--layers is empty; give it a value, or leave it out"),
        ("0,", "must be layer numbers with commas"),
        ("1.0", "must be layer numbers with commas"),
        ("first", "must be layer numbers with commas"),
        ("9" * 5000, "must be layer numbers with commas"),
        ("0,0", "layer 0 stands twice"),
        ("-1", "there is no layer -1; the layers are 0 to 1"),
        ("99", "there is no layer 99; the layers are 0 to 1"),
        ("0,1", "keeps all 2 layers full"),
    ],
)
def test_layers_that_cannot_be_kept(capsys, tmp_path, teacher_folder, recipe_file, layers, says):
    options = (teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "out", f"--layers={layers}")
    for command in (("morph",), ("morph", "--dry-run"), ("build",)):
        sentence = refused(capsys, *command, *options)
        assert says in sentence and len(sentence) < 250
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        ({"layers.0": "full", "layers.1": "full"}, "keeps all 2 layers full"),
        ({"layers.0": "linear", "layers.1": "linear"}, "keeps no layer full"),
        ({f"layers.{layer}": "full" for layer in range(3)}, "belongs to another model"),
        ({"layers.0": "full", "layers.1": "mamba"}, "the option 'mamba'; it can be full, linear"),
        ({"layers.0": "full", "layers.1": ["linear"]}, "is no plan: assignments.layers.1"),
    ],
)
def test_plans_that_cannot_be_built(capsys, tmp_path, teacher_folder, recipe_file, assignments, says):
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, "assignments": assignments, "budget": "1"}))
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--plan", tmp_path / "plan.json")
    sentence = refused(capsys, "morph", teacher_folder, *options)
    assert says in sentence and "plan.json" in sentence
    assert "not both" in refused(capsys, "morph", teacher_folder, *options, "--layers", "0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["select.strategy=uniform", "select.settings.offset=9"], "offset must be at most 1 for 1 of 2 layers; got 9"),
        (["select.settings.steps=abc"], "strategy budgeted-gates: steps must be a whole number at least 1"),
        (["select.settings.steps=true"], "steps must be a whole number"),
        (["select.settings.learning_rate=.nan"], "learning_rate must be a number above 0"),
        (["select.strategy=race", "select.settings.num_questions=0"], "strategy race: num_questions must be"),
        (["select.strategy=nll", "select.settings.direction=sideways"], "direction must be restore or switch"),
        (["host.window=wide"], "host.window must be a whole number at least 2; got 'wide'"),
        (["host.mamba_expand=1"], "Qwen3_5ForCausalLM has no setting 'mamba_expand'"),
        (["budget=0.25"], "budget '0.25' is none of 7 (layers), 25%"),
        (["budget=[1]"], "budget '[1]' is none of"),
        (["budget=kv=1MiB@2"], "at 2 tokens the cache of a full layer takes"),
        (["budget=kv=1B@8192"], "is below one full layer"),
        (["seed=-1"], "seed: "),
        (["seed=1.5"], "seed: "),
        (["seed=4294967296"], "seed: "),
    ],
)
def test_settings_that_cannot_be(capsys, tmp_path, teacher_folder, recipe_file, changes, says):
    """By type, by range, and by what only the teacher and the budget tell: before there is a folder."""
    given = [part for change in changes for part in ("--set", change)]
    options = (teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "out", *given)
    for command in (("align",), ("morph", "--dry-run")):
        assert says in refused(capsys, *command, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "given", "needed"),
    [
        ("select", ("--within", "5%"), "--curve"),
        ("select", ("--recall-questions", 50), "--curve"),
        ("compare", ("--reference-tokens", 8_000_000), "--reference found"),
        ("compare", ("--reference", "found", "--max-plans", 5), "--reference enumerated"),
        ("compare", ("--distill-budget", "2"), "--distill-steps"),
        ("evaluate", ("--style", "ruler"), "--lengths"),
        ("evaluate", ("--depths", 3), "--lengths"),
        ("evaluate", ("--grid-tasks", "niah_single_1"), "--lengths"),
    ],
)
def test_options_that_belong_to_another(capsys, tmp_path, teacher_folder, command, given, needed):
    """Refused before any work, also where the value is the default's."""
    places = {
        "select": ("--from", tmp_path / "run", "--output", tmp_path / "plan.json"),
        "compare": ("--output", tmp_path / "referee"),
        "evaluate": (),
    }
    said = refused(capsys, command, teacher_folder, *places[command], *given)
    assert f"{given[-2]} changes nothing without {needed}" in said
    assert not list(tmp_path.iterdir())


def test_a_device_without_enough_memory_is_one_sentence(capsys, monkeypatch, teacher_folder):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("flashmorph.pipeline.evaluate_models.compare_models", full)
    said = refused(capsys, "evaluate", teacher_folder)
    assert "Tried to allocate 20.00 GiB.: ask for shorter contexts" in said


def test_data_in_place_of_a_mixture_is_said(capsys, tmp_path, teacher_folder):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Row {number}. " * 50}) + "\n" for number in range(400)))
    small = ("align.tokens=4096", "distill.tokens=65536", "align.batch_tokens=4096", "select.search.questions=4")
    changes = [part for change in small for part in ("--set", change)]
    options = (
        teacher_folder,
        "--recipe",
        "chat",
        "--output",
        tmp_path / "out",
        "--dry-run",
        "--allow-repeat",
        *changes,
    )
    run_command("morph", *options, "--data", text)
    printed = " ".join(capsys.readouterr().out.split())
    about = "70% HuggingFaceFW/fineweb-edu, 30% HuggingFaceTB/smoltalk; the loss is on all of its tokens"
    assert f"--data stands in place of the recipe's mixture of {about}" in printed


def test_numbers_are_read_as_people_write_them(recipe_file, tmp_path):
    written = recipe_file.read_text()
    assert load_recipe(recipe_file, parse_changes(["budget=2"])).budget == "2"
    assert load_recipe(recipe_file, parse_changes(["budget=25%"])).budget == "25%"
    assert load_recipe(recipe_file, parse_changes(["align.learning_rate=1e-3"])).align.learning_rate == 1e-3
    file = tmp_path / "recipe.yaml"
    file.write_text(written.replace("budget: '1'", "budget: 1") + "seed: 1\n")
    read = load_recipe(file)
    assert (read.budget, read.seed) == ("1", 1)
    assert Recipe.model_validate(yaml.safe_load(read.to_yaml())).to_yaml() == read.to_yaml()


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
    file.write_bytes(b"budget: 1\xff\n")
    assert f"recipe {file} is not UTF-8 text (byte 9)" in refused(capsys, *options, file)
    written = yaml.safe_dump(FEW_STEPS)
    for content, says in {
        written + "budget: 2\n": "the key 'budget' stands twice in one mapping (line",
        written.replace("align:\n", "align:\n  tokens: 5\n"): "the key 'tokens' stands twice",
        "budget: 25%\n\talign: 5\n": "not valid YAML",
        "[" * 20_000: "nested too deeply",
        "seed: 2001-99-99\n": "not valid YAML",
        "seed: " + "9" * 5000: "not valid YAML",
        f"seed: {'x' * 5000}\ntasks: {{a: {{task: hops}}}}\n": "seed: input should be a valid integer (got 'xxx",
        "tasks: {a: {task: hops}}\ndata: {mixture: [{sorce: demo, weight: 1}]}\n": "data.mixture[0]",
        "tasks: {a: {task: hops}}\ndata: {mixture: [{source: a, weight: 1, wait: 2}]}\n": "data.mixture[0].wait",
        "tasks: {a: {task: hop}}\n": "tasks.a: task 'hop' is unknown",
        "tasks: {a: 5}\n": "tasks.a: ",
        "tasks: {1: {task: hops}}\n": "tasks",
        "a: &a [x, x]\nb: &b [*a, *a]\ntasks: *b\n": "tasks: input should be a valid dictionary",
    }.items():
        file.write_text(content)
        sentence = refused(capsys, *options, file)
        assert says in sentence and len(sentence) < 400
    file.write_text(written)
    assert "limit is 512" in refused(capsys, *options, file, "--set", "evaluate.length=4096")
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_small(capsys, tmp_path, teacher_folder, recipe_file):
    text = tmp_path / "text.txt"
    text.write_text("a few words\n" * 3)
    options = ("--recipe", recipe_file, "--output", tmp_path / "out", "--data", text)
    sentence = refused(capsys, "align", teacher_folder, *options)
    assert "too small" in sentence or "no text for the split" in sentence


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("morph tiny --layers 1,2 --budget 5 --output NEW", "--layers says what stays full, so that --budget changes"),
        ("build tiny --layers 1,2 --strategy race --output NEW", "so that --strategy changes nothing"),
        ("estimate tiny --window 5 --mixers full,linear", "--window 5 is of no use to --mixers full,linear"),
        ("extend tiny --recipe laptop --layers 2,5 --output NEW", "give --set extend.tokens=... with"),
        ("morph tiny --from nothere --dry-run --output NEW", "nothere is no run of flashmorph's"),
        ("compare tiny --budgets 1,x --output NEW", "budget 'x' is none of 7 (layers)"),
        ("compare tiny --strategies halo2 --output NEW", "unknown strategy 'halo2'; did you mean 'halo'"),
        (
            "generate tiny --prompt hello --max-new-tokens 100000",
            "the prompt has 3, so that --max-new-tokens can be 509",
        ),
    ],
)
def test_options_that_change_nothing_or_cannot_be_are_refused_before_anything_is_written(
    capsys, tmp_path, command, says
):
    new = tmp_path / "new"
    assert says in refused(capsys, *(str(new) if part == "NEW" else part for part in command.split()))
    assert not new.exists()


def test_no_command_takes_texts_or_prompts_twice(capsys):
    """Who gives several means all of them; of other options the last one counts, as everywhere."""
    commands: Any = get_command(app)
    for name, command in commands.commands.items():
        options = [option for option in command.params if option.param_type_name == "option" and not option.is_flag]
        for (long,) in (option.opts for option in options if option.opts[0] in ("--data", "--prompt")):
            sentence = refused(capsys, name, "tiny", long, "1", f"{long}=2")
            assert f"{long} takes one value, and it has '1' and '2': give one" in sentence
            assert ("in data.mixture" in sentence) == (long == "--data")


def test_what_may_be_repeated_may(capsys, tmp_path, teacher_folder, recipe_file):
    """Options of several values and flags; and what looks like an option may be a value, or stand behind `--`."""
    options = ("--recipe", "none", "--recipe", recipe_file, "--allow-repeat", "--allow-repeat", "--dry-run", "--json")
    settings = ("--set", "align.tokens=512", "--set=distill.tokens=512", "--set", "extend.tokens=512")
    assert run_command("morph", teacher_folder, "-o", tmp_path / "run", *options, *settings) == 0
    capsys.readouterr()
    sentence = refused(capsys, "generate", tmp_path / "none", "--prompt", "--device", "--device", "cpu")
    assert "takes one value" not in sentence
    sentence = refused(capsys, "generate", "--prompt", "a", "--", "--prompt", "--prompt")
    assert "takes one value" not in sentence


@pytest.mark.parametrize("command", ["morph tiny --output out", "evaluate tiny", "bench tiny"])
@pytest.mark.parametrize("first", [["--set", "align.tokens=1"], ["--set=align.tokens=1"]])
def test_a_setting_without_its_own_option_is_named(capsys, tmp_path, monkeypatch, command, first):
    monkeypatch.chdir(tmp_path)
    sentence = refused(capsys, *command.split(), *first, "distill.tokens=2", "x=3")
    assert sentence.endswith(
        "'distill.tokens=2' has no --set: give each setting its own, --set align.tokens=1 --set distill.tokens=2"
    )
    (tmp_path / "distill.tokens=2").mkdir()
    if not command.startswith("morph"):
        assert "has no --set" not in refused(capsys, *command.split(), *first, "distill.tokens=2")


def test_a_stage_that_a_recipe_switches_off_is_switched_on_by_one_setting(capsys, tmp_path):
    options = ("morph", "tiny", "--recipe", "laptop", "--output", tmp_path / "run", "--dry-run", "--json")
    assert run_command(*options, "--set", "extend.tokens=40960") == 0
    assert "extend" in [row["stage"] for row in json.loads(capsys.readouterr().out)]


def test_select_without_a_run(capsys, tmp_path, teacher_folder):
    options = ("--from", tmp_path / "none", "--output", tmp_path / "plan.json")
    assert "flashmorph align" in refused(capsys, "select", teacher_folder, *options)


def test_a_run_that_is_aligned_brings_its_recipe(capsys, tmp_path, teacher_folder, recipe_file):
    """`select`, `compare` and `evaluate` take it, what is given goes on top, and what they change is not kept."""
    run = tmp_path / "run"
    own = ("--set", "align.learning_rate=0.0005", "--set", "select.settings.steps=3")
    assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", run, *own) == 0
    kept = (run / "recipe.yaml").read_text()
    assert yaml.safe_load(kept)["align"]["learning_rate"] == 0.0005
    capsys.readouterr()
    chosen = ("select", teacher_folder, "--from", run, "--output", tmp_path / "plan.json")
    assert run_command(*chosen, "--strategy", "nll", "--set", "select.settings.num_questions=2") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"recipe: {run / 'recipe.yaml'} (--recipe takes another)" in printed
    assert printed.count("done before") == 2
    assert (run / "recipe.yaml").read_text() == kept
    judged = ("compare", teacher_folder, "--output", tmp_path / "judged", "--from", run, "--budgets", "1")
    judged += ("--questions", 2, "--recall-questions", 0, "--seeds", 1, "--strategies")
    assert "offset must be at most 1" in refused(capsys, *judged, "uniform+offset=9")
    assert run_command(*judged, "uniform") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"recipe: {run / 'recipe.yaml'}" in printed and printed.count("done before") == 2
    built = ("build", teacher_folder, "--recipe", recipe_file, "--output", run, *own, "--layers", "0")
    assert run_command(*built) == 0
    (model,) = run.glob("stages/build-*/model")
    capsys.readouterr()
    assert run_command("evaluate", teacher_folder, model, "--set", "evaluate.questions=1", "--json") == 0
    printed = capsys.readouterr()
    assert f"recipe: {run / 'recipe.yaml'}" in " ".join(printed.err.split())
    assert set(json.loads(printed.out)[str(model)]["recall_by_task"]) == {"one_key", "two_hops"}


def test_what_is_published_keeps_its_recipe(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.keep_recipe("budget: 1\n")
    folder.keep_recipe("budget: 2\n")
    assert (tmp_path / "run/recipe.yaml").read_text() == "budget: 2\n"
    (tmp_path / "run/results.json").write_text("{}")
    folder.keep_recipe("budget: 3\n")
    assert (tmp_path / "run/recipe.yaml").read_text() == "budget: 2\n"


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
    assert facts["torch"] == version("torch")
    assert "torch_chunk_gated_delta_rule" in facts
    assert run_command("env") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(facts)
    width = max(map(len, facts))
    assert all(line.startswith(f"{name:<{width}}  ") for name, line in zip(facts, lines, strict=True))


def test_the_version_is_an_option(capsys):
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"flashmorph {version('flashmorph')}\n"
