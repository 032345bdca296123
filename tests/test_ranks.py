"""Two processes on gloo, started by torchrun as a user would: the same plan and weights as one process."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import FEW_STEPS, run_command, tiny_tokenizer
from families import SHAPE
from gguf_files import made, written
from safetensors import safe_open
from safetensors.torch import load_file
from test_step import KINDS, assert_same, expected
from test_training import SETTINGS, log_of, settings_of
from together import judged, searched, trained
from transformers import Qwen3Config, Qwen3ForCausalLM

from flashmorph.errors import UserError
from flashmorph.model import sharding
from flashmorph.plan import Plan
from flashmorph.stages import AlignSettings, DistillSettings
from flashmorph.stages.checkpoints import FINISHED


def torchrun(*command: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, command)]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest of two sets of the same weights."""
    assert one.keys() == other.keys()
    return max((weight - other[name]).abs().max().item() for name, weight in one.items())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Random, in float32, so that no rounding hides a difference."""
    folder = tmp_path_factory.mktemp("teachers") / "random"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Five steps of two rows, so that two processes hold one micro-batch together."""
    path = tmp_path_factory.mktemp("recipes") / "five_steps.yaml"
    stages = {name: {**FEW_STEPS[name], "tokens": 5 * FEW_STEPS[name]["batch_tokens"]} for name in SETTINGS}
    path.write_text(yaml.safe_dump({**FEW_STEPS, **stages, "bf16": False, "baseline": None}))
    return path


@pytest.fixture(scope="module")
def alone(teacher, recipe, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    assert run_command("morph", teacher, "--recipe", recipe, "--output", output) == 0
    return output


def run_of_two(teacher: Path, recipe: Path, output: Path, *more: str) -> tuple[Path, str]:
    """The run of two processes, and what they printed."""
    command = torchrun("-m", "flashmorph", "morph", teacher, "--recipe", recipe, "--output", output, *more)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done.stdout


@pytest.fixture(scope="module")
def together(teacher, recipe, tmp_path_factory) -> tuple[Path, str]:
    return run_of_two(teacher, recipe, tmp_path_factory.mktemp("together") / "run")


@pytest.fixture(scope="module")
def sharded(teacher, recipe, tmp_path_factory) -> tuple[Path, str]:
    return run_of_two(teacher, recipe, tmp_path_factory.mktemp("sharded") / "run", "--set", "shard=true")


@pytest.fixture(params=["together", "sharded"])
def two(request) -> tuple[Path, str]:
    """Each of the two: with whole weights, and with divided ones."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("changes", "ways"),
    [({"budget": "heads=2"}, ((), ("--set", "shard=true"))), ({"host": {"window": 32}}, (("--set", "shard=true"),))],
    ids=["heads", "windows"],
)
def test_two_processes_do_as_one_where_branches_share_projections(teacher, recipe, tmp_path, changes, ways):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"extend": None} | changes))
    one = tmp_path / "one"
    assert run_command("morph", teacher, "--recipe", own, "--output", one) == 0
    for more in ways:
        two, _ = run_of_two(teacher, own, tmp_path / f"two-{len(more)}", *more)
        assert Plan.load(two / "plan.json").assignments == Plan.load(one / "plan.json").assignments
        weights = [load_file(run / "model.safetensors") for run in (one, two)]
        assert difference(weights[0], weights[1]) < 1e-5


def stages_of(run: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in run.glob("stages/*/stage.json")}


def test_two_processes_are_two_and_speak_once(two):
    output, printed = two
    assert "2 processes share the work, this one on cpu" in printed
    records = stages_of(output)
    assert {record["processes"] for record in records.values()} == {2}
    for name in ("transplant", "align", "select", "build", "distill", "extend"):
        assert sum(line.startswith(name) for line in printed.splitlines()) == 1
    assert not list(output.glob("stages/*.partial")) and not list(output.rglob(".*.part"))


def test_the_record_says_whether_weights_were_divided(alone, together, sharded):
    for run, divided in ((alone, False), (together[0], False), (sharded[0], True)):
        records = [record for name, record in stages_of(run).items() if name.startswith(("align", "distill", "extend"))]
        assert [record["sharded"] for record in records] == [divided] * 3


def test_two_processes_find_the_plan_of_one_at_the_same_cost(alone, two):
    plans = [Plan.load(run / "plan.json") for run in (alone, two[0])]
    assert plans[0].assignments == plans[1].assignments
    scores = [torch.tensor([list(row.values()) for row in plan.scores]) for plan in plans]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    costs = [
        next(record["cost"] for name, record in stages_of(run).items() if name.startswith("select"))
        for run in (alone, two[0])
    ]
    for name in ("tokens_forward", "tokens_backward", "flops"):
        assert costs[0][name] == costs[1][name] > 0


def test_two_processes_train_the_weights_of_one_under_the_same_digests(alone, two):
    assert stages_of(alone).keys() == stages_of(two[0]).keys()
    for pattern in ("align-*/branches", "distill-*/model/model", "extend-*/model/model"):
        (one,), (other,) = (list(run.glob(f"stages/{pattern}.safetensors")) for run in (alone, two[0]))
        assert difference(load_file(one), load_file(other)) <= 1e-5
    results = [json.loads((run / "results.json").read_text()) for run in (alone, two[0])]
    assert results[0]["hybrid"]["recall"] == results[1]["hybrid"]["recall"]
    assert results[0]["hybrid"]["perplexity"] == pytest.approx(results[1]["hybrid"]["perplexity"], rel=1e-5)


@pytest.fixture(scope="module")
def killed(teacher, recipe, tmp_path_factory) -> Path:
    """A run of two processes, killed when alignment has its first checkpoint."""
    output = tmp_path_factory.mktemp("killed") / "run"
    command = torchrun("-m", "flashmorph", "align", teacher, "--recipe", recipe, "--output", output)
    process = psutil.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob(f"stages/align-*/checkpoints/*/{FINISHED}")):
        time.sleep(0.002)
    for each in (*process.children(recursive=True), process):
        each.kill()
    process.wait()
    return output


def mark_first_step(log: Path) -> None:
    """A mark that is there afterwards only where training goes on: from step 0 on the log begins anew."""
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"grad_norm": 77.0}), *rest]) + "\n")


def has_mark(log: Path) -> bool:
    return json.loads(log.read_text().splitlines()[0])["grad_norm"] == 77.0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_of_two_goes_on_in_any_number(killed, together, teacher, recipe, tmp_path, processes):
    output = tmp_path / "run"
    shutil.copytree(killed, output)
    assert list(output.glob(f"stages/align-*.partial/checkpoints/*/{FINISHED}"))
    mark_first_step(*output.glob("stages/align-*.partial/log.jsonl"))
    command = ["align", teacher, "--recipe", recipe, "--output", output]
    if processes == 1:
        assert run_command(*command) == 0
    else:
        again = torchrun("-m", "flashmorph", *command)
        done = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
    assert has_mark(*output.glob("stages/align-*/log.jsonl"))
    (whole,) = together[0].glob("stages/align-*/branches.safetensors")
    (resumed,) = output.glob("stages/align-*/branches.safetensors")
    assert difference(load_file(whole), load_file(resumed)) <= (1e-5 if processes == 1 else 0)


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    """What two processes did with weights divided among them: tests/together.py."""
    folder = tmp_path_factory.mktemp("divided")
    command = torchrun(Path(__file__).parent / "together.py", folder)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_mesh_is_made_before_ranks_take_turns(monkeypatch):
    """It may take a collective: where there is a GPU, PyTorch makes a group of its own for a mesh on gloo."""
    events = []
    monkeypatch.setattr(sharding, "_mesh", lambda kind: events.append(f"mesh {kind}"))
    monkeypatch.setattr(sharding.distributed, "wait", lambda: events.append("wait"))
    monkeypatch.setattr(sharding.distributed, "are_several", lambda: True)
    monkeypatch.setattr(sharding.distributed, "local_count", lambda: 2)
    monkeypatch.setattr(sharding.distributed, "local_rank", lambda: 1)
    sharding.in_turn(lambda: events.append("make"), torch.device("cpu"))
    assert events == ["mesh cpu", "wait", "make", "wait"]


def test_each_machine_opens_the_teacher_in_its_own_cache(tmp_path):
    file = written(made("qwen3"), tmp_path / "teacher.gguf")
    command = torchrun(Path(__file__).parent / "two_machines.py", file, tmp_path)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    one, other = json.loads((tmp_path / "problems.json").read_text())
    assert one == other and len(one) == 2
    assert "is not the same on all machines" in one[0] and "HF_HOME" in one[0]
    assert one[1].startswith("on the machine of rank 1: ")


@pytest.mark.parametrize("kind", SETTINGS)
def test_divided_weights_learn_what_whole_ones_learn(divided, tmp_path, kind):
    assert difference(trained(kind, tmp_path, False), load_file(divided / f"{kind}-sharded.safetensors")) <= 1e-5


@pytest.mark.parametrize("kind", SETTINGS)
def test_weights_that_are_gathered_in_bfloat16_learn_as_under_autocast(divided, kind):
    one, other = ([entry["loss"] for entry in log_of(divided / f"{kind}-bf16-{name}")] for name in (False, True))
    assert one[:2] == pytest.approx(other[:2], rel=0.01) and one == pytest.approx(other, rel=0.1)


def test_neither_parts_nor_activations_that_are_computed_again_change_what_is_learned(divided):
    one, other = (load_file(divided / f"extend-{name}.safetensors") for name in ("sharded", "again"))
    assert difference(one, other) <= 1e-5


@pytest.mark.parametrize("micro_rows", [1, None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_is_the_mean_of_all_its_learnt_tokens(divided, kind, micro_rows):
    """Rows that learn one token, all and none; with whole weights, and divided where a micro-batch has two rows."""
    path = divided / f"{kind}-step-{micro_rows}.safetensors"
    with safe_open(path, "pt") as file:
        logged = float(file.metadata()["loss"])
    wanted, loss = expected(kind)
    assert logged == pytest.approx(loss, rel=1e-4)
    assert_same(load_file(path), wanted)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_checkpoint_of_two_that_divide_is_read_by_one_that_does_not(divided, tmp_path, kind):
    """Step 3's, written by two processes, is gone on from in this one."""
    shutil.copytree(divided / f"{kind}-sharded", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.glob("checkpoint-3/shards/*.distcp"))) == 2
    shutil.rmtree(checkpoints / "checkpoint-5")
    mark_first_step(tmp_path / "run" / "log.jsonl")
    found = trained(kind, tmp_path / "run", False)
    assert has_mark(tmp_path / "run" / "log.jsonl")
    assert difference(found, load_file(divided / f"{kind}-sharded.safetensors")) <= 1e-5


def test_a_search_is_told_the_same_by_one_by_two_and_by_two_that_divide(divided, tmp_path):
    one = searched(tmp_path, False)
    for other in json.loads((divided / "searched.json").read_text()):
        for name, values in one.items():
            assert values == pytest.approx(other[name], rel=1e-4, abs=1e-7), name
        assert one["cost"] == other["cost"]


def test_answers_losses_of_text_and_stored_logits_are_shared_and_those_of_one(divided, tmp_path):
    one, two = judged(tmp_path), json.loads((divided / "judged.json").read_text())
    for name in ("scores", "text", "logits"):
        assert one[name] == two[name] and one[name], name
    (every,), shares = one["forwards"], two["forwards"]
    assert sum(shares) == every and min(shares) >= every // 3


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("micro", [None, 1, 2, 3, 8, 16])
def test_a_step_is_the_same_rows_in_the_same_micro_batches_among_any_number(processes, micro):
    settings = settings_of(DistillSettings, rows=16, micro_batch_tokens=micro and micro * 24)
    alone, shared = settings.division(1), settings.division(processes)
    assert alone.sharing == 1 and shared.rows * shared.accumulation * processes == 16
    assert shared.rows * shared.sharing == alone.rows <= (micro or 16)
    assert math.gcd(shared.sharing, processes) == shared.sharing


def test_a_batch_that_cannot_be_shared_evenly_says_with_how_many_tokens_it_can():
    settings = settings_of(AlignSettings, rows=6)
    with pytest.raises(UserError, match="align.batch_tokens=144 is 6 rows .* 4 processes .* with 192 they can"):
        settings.division(4)
    assert settings_of(AlignSettings, rows=8).division(4).rows == 2
