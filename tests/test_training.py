"""Training stages: what they train, and that they can be killed at any time without a trace in the result."""

import gc
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_qwen3, small_morphable
from safetensors.torch import load_file, save_file
from torch import nn

from flashmorph.convert.in_memory import transplant
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.losses import forward_kl
from flashmorph.plan import Budget
from flashmorph.progress import Report, silent
from flashmorph.stages import AlignSettings, DistillSettings, ExtendSettings, align, alignment_errors, distill, extend
from flashmorph.stages.checkpoints import FINISHED, last_checkpoint
from flashmorph.stages.settings import TrainSettings
from flashmorph.stages.step import token_mean
from flashmorph.stages.training import train
from flashmorph.stages.watch import Watch

LENGTH = 24
STEPS = 6


@pytest.fixture(autouse=True, scope="module")
def _less_garbage_to_collect():
    """Trainer collects garbage after each run, which takes longer than these runs."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows_in(folder: Path, rows: int = 64) -> Rows:
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(97, size=(rows, LENGTH), dtype=np.uint32)
    np.save(folder / "rows.npy", ids)
    return Rows(folder / "rows.npy")


def settings_of(kind: type, steps: int = STEPS, rows: int = 4, **changes):
    values = {"tokens": steps * rows * LENGTH, "length": LENGTH, "batch_tokens": rows * LENGTH, "warmup_steps": 1}
    return kind(**{**values, "learning_rate": 3e-3, "checkpoint_steps": 2, **changes})


def student_and_teacher():
    morphable = small_morphable(0)
    budget = Budget("layers", 1)
    teacher, _ = transplant(random_qwen3(0))
    return morphable.instantiate(morphable.space(budget).plan(["layers.1"], budget)), teacher


def run(kind: str, folder: Path, report: Report = silent, seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """A stage on a few rows, from fresh weights and whatever checkpoint is in `folder`; the weights it ends with."""
    more_rows = changes.pop("more_rows", 0)
    settings: Any = settings_of(SETTINGS[kind], **changes)
    rows = rows_in(folder, settings.rows + more_rows)
    if kind == "align":
        morphable = small_morphable(0)
        align(morphable, rows, settings, folder, seed, False, report)
        return {name: weight.clone() for name, weight in morphable.branch_state().items()}
    student, teacher = student_and_teacher()
    if kind == "distill":
        distill(student, teacher, rows, settings, folder, seed, False, report)
    else:
        extend(student, rows, settings, folder, seed, False, report)
    return {name: weight.detach().clone() for name, weight in student.named_parameters()}


SETTINGS = {"align": AlignSettings, "distill": DistillSettings, "extend": ExtendSettings}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_alignment_trains_the_branches_and_nothing_else(tmp_path):
    morphable = small_morphable(3)
    ids = torch.tensor([rows_in(tmp_path)[row]["input_ids"] for row in range(16)])
    before = {name: weight.clone() for name, weight in morphable.state_dict().items()}
    start = alignment_errors(morphable, ids)
    settings = settings_of(AlignSettings, steps=15, learning_rate=1e-2)
    align(morphable, rows_in(tmp_path), settings, tmp_path)
    end = alignment_errors(morphable, ids)
    assert all(after < 0.95 * error for after, error in zip(end, start, strict=True))
    changed = {name for name, weight in morphable.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(".branches.linear." in name for name in changed)
    assert not any(weight.requires_grad for weight in morphable.parameters())
    losses = [entry["loss"] for entry in log_of(tmp_path)]
    assert losses[-1] < losses[0]


def test_each_branch_learns_as_if_it_were_alone(tmp_path):
    """The loss is a sum over layers without any path between them, and gradients are clipped branch by branch."""
    both = run("align", tmp_path / "both", max_grad_norm=0.01)
    morphable = small_morphable(0)
    with torch.no_grad():
        for weight in morphable.branch_parameters()[0]:
            weight.mul_(50)
    settings = settings_of(AlignSettings, max_grad_norm=0.01)
    align(morphable, rows_in(tmp_path, settings.rows), settings, tmp_path / "spoiled")
    spoiled = morphable.branch_state()
    second = [name for name in both if name.startswith("layers.1.")]
    assert second and all(torch.equal(spoiled[name], both[name]) for name in second)
    assert not any(torch.equal(spoiled[name], both[name]) for name in both if name.endswith("0.linear.out_proj.weight"))


def test_distillation_brings_the_student_nearer_and_leaves_the_teacher(tmp_path):
    student, teacher = student_and_teacher()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    rows = rows_in(tmp_path)
    ids = torch.tensor([rows[row]["input_ids"] for row in range(16)])

    @torch.no_grad()
    def divergence() -> float:
        hidden = [model.model(input_ids=ids, use_cache=False).last_hidden_state for model in (student, teacher)]
        return forward_kl(hidden[0], student.lm_head, hidden[1], teacher.lm_head).item()

    start = divergence()
    distill(student, teacher, rows, settings_of(DistillSettings, steps=15), tmp_path)
    assert divergence() < 0.95 * start
    assert same(dict(teacher.state_dict()), before)
    assert not student.training
    assert log_of(tmp_path)[0]["loss"] == pytest.approx(start, rel=0.5)


def test_distillation_refuses_another_vocabulary(tmp_path):
    student, _ = student_and_teacher()
    teacher, _ = transplant(random_qwen3(0, vocab_size=98))
    with pytest.raises(UserError, match="97 tokens in its vocabulary and the teacher 98"):
        distill(student, teacher, rows_in(tmp_path), settings_of(DistillSettings), tmp_path)


def test_extension_lowers_the_loss_on_what_it_trains_on(tmp_path):
    run("extend", tmp_path, steps=16, rows=8)
    losses = [entry["loss"] for entry in log_of(tmp_path)]
    assert sum(losses[8:]) < sum(losses[:8])


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path, kind):
    first, second, other = (run(kind, tmp_path / str(number), seed=number // 2) for number in range(3))
    assert same(first, second)
    assert not same(first, other)


def test_the_log_has_one_line_a_step_and_progress_tells_it(tmp_path):
    seen = []
    run("distill", tmp_path, report=lambda done, total, **figures: seen.append((done, total, figures["loss"])))
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert seen == [(entry["step"], STEPS, entry["loss"]) for entry in log]
    assert all(math.isfinite(entry[name]) for entry in log for name in ("loss", "grad_norm", "learning_rate"))
    assert max(entry["learning_rate"] for entry in log) == pytest.approx(3e-3)


class CountsRows(nn.Module):
    """Its loss is the mean of its weight; it remembers the rows that it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.batches: list[int] = []

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.batches.append(len(input_ids))
        return token_mean(self.weight.mean(), 1)


@pytest.mark.parametrize(("batch", "micro"), [(4, None), (4, 4), (4, 2), (4, 1), (3, 2), (5, 3), (4, 8)])
def test_a_step_takes_its_whole_batch_in_parts_that_fit(tmp_path, batch, micro):
    model = CountsRows()
    micro_tokens = micro and micro * LENGTH
    settings = settings_of(TrainSettings, steps=3, rows=batch, micro_batch_tokens=micro_tokens)
    train(model, rows_in(tmp_path, settings.rows), settings, tmp_path, 0, False, silent)
    assert sum(model.batches) == settings.rows == 3 * batch
    assert max(model.batches) <= (micro or batch)


def test_a_batch_in_parts_teaches_what_the_whole_batch_teaches(tmp_path):
    whole = run("distill", tmp_path / "whole")
    parts = run("distill", tmp_path / "parts", micro_batch_tokens=2 * LENGTH)
    moved = run("distill", tmp_path / "other", seed=1)
    for name, weight in whole.items():
        difference = (parts[name] - weight).abs().max()
        assert difference <= 0.05 * (moved[name] - weight).abs().max() + 1e-7, name


def test_a_loss_that_is_not_finite_stops_with_one_sentence(tmp_path):
    student, teacher = student_and_teacher()
    with torch.no_grad():
        teacher.lm_head.weight[5] = math.nan
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        distill(student, teacher, rows_in(tmp_path), settings_of(DistillSettings, checkpoint_steps=1), tmp_path)
    assert last_checkpoint(tmp_path) is None


class BreaksItsGradient(nn.Module):
    """A finite loss whose gradient is not a number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return token_mean((self.weight * 0).sqrt().sum(), 1)


def spoiled(model: nn.Module, layer: int) -> None:
    """Put a weight that is not finite into one decoder layer."""
    with torch.no_grad():
        next(iter(model.model.layers[layer].mlp.parameters()))[0, 0] = math.nan


def test_a_loss_that_is_not_finite_names_step_and_layer(tmp_path):
    student, teacher = student_and_teacher()
    spoiled(student, 1)
    settings: Any = settings_of(DistillSettings, checkpoint_steps=1)
    with pytest.raises(
        UserError, match="the loss is nan at step 1, first in layer 1; the last good checkpoint is kept"
    ):
        distill(student, teacher, rows_in(tmp_path), settings, tmp_path)
    morphable = small_morphable(0)
    with torch.no_grad():
        morphable.branch_parameters()[1][0].fill_(math.inf)
    with pytest.raises(UserError, match="the loss is nan at step 1, first in layer 1"):
        align(morphable, rows_in(tmp_path), settings_of(AlignSettings), tmp_path / "align")


class BreaksInALayer(nn.Module):
    """A loss that is finite all the time; the gradient of one layer is not from a step on."""

    def __init__(self, layer: int, step: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.layer, self.left = layer, step

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.left -= 1
        loss = torch.stack([layer.weight.square().sum() for layer in self.layers]).sum()
        if self.left <= 0:
            loss = loss + (self.layers[self.layer].bias * 0).sqrt().sum()
        return token_mean(loss, 1)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_gradient_that_is_not_finite_names_step_and_layer_and_keeps_what_was(tmp_path, layer):
    model = BreaksInALayer(layer, step=4)
    settings = settings_of(TrainSettings, checkpoint_steps=1)
    with pytest.raises(UserError, match=f"the gradient is not finite at step 4, in layer {layer};"):
        train(model, rows_in(tmp_path), settings, tmp_path, 0, False, silent)
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")
    kept = load_file(Path(last_checkpoint(tmp_path)) / "trainable.safetensors")
    assert all(torch.isfinite(weight).all() for weight in kept.values())
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3]


class Grows(nn.Module):
    """Its loss grows a hundredfold with each step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
        self.size = 0.05

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.size *= 10
        weights = self.layers[0].weight + 3 * self.layers[1].weight
        return token_mean(self.size * (1 + (weights - weights.detach()).sum()), 1)


def test_a_loss_that_explodes_stops_before_it_is_kept(tmp_path):
    settings = settings_of(TrainSettings, checkpoint_steps=1)
    with pytest.raises(UserError, match="exploded: 50 at step 3, 0.5 at the first, the largest gradient in layer 1"):
        train(Grows(), rows_in(tmp_path), settings, tmp_path, 0, False, silent)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")


DAMAGES = {
    "weights cut short": lambda place: place.joinpath("trainable.safetensors").write_bytes(b"cut"),
    "optimiser gone": lambda place: place.joinpath("optimizer.pt").unlink(),
    "optimiser of zeros": lambda place: place.joinpath("optimizer.pt").write_bytes(
        bytes(place.joinpath("optimizer.pt").stat().st_size)
    ),
    "never finished": lambda place: place.joinpath(FINISHED).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, damage, caplog):
    whole = run("distill", tmp_path / "whole")

    def stop(done: float, total: float, **figures: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("distill", tmp_path, stop)
    newest = Path(last_checkpoint(tmp_path))
    assert newest.name == "checkpoint-4"
    DAMAGES[damage](newest)
    seen: list[float] = []
    assert same(run("distill", tmp_path, lambda done, total, **figures: seen.append(done)), whole)
    assert seen == [3, 4, 5, 6]
    said = "going on from the one before it" in caplog.text
    assert said == (damage != "never finished") and len([*tmp_path.glob("checkpoints/*")]) == 2


def test_a_disk_that_is_full_is_one_sentence_and_the_last_checkpoint_stays(tmp_path):
    """Files may not grow beyond a limit that the log keeps and a checkpoint does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(done: float, total: float, **figures: float) -> None:
        if done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(UserError) as error:
            run("distill", tmp_path, report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith("cannot write checkpoint-4 in ") and "\n" not in str(error.value)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    assert same(run("distill", tmp_path), run("distill", tmp_path / "whole"))


def test_the_log_goes_where_it_is_asked_to_and_nowhere_else(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    student, teacher = student_and_teacher()
    folder = tmp_path / "stage"
    distill(student, teacher, rows_in(folder), settings_of(DistillSettings), folder, report_to=["tensorboard"])
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [entry["loss"] for entry in log_of(folder)]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"stage"} and "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    """The loss of the last step is finite, its gradient is not: what would be saved is worthless."""
    model = BreaksItsGradient()
    with pytest.raises(UserError):
        train(model, rows_in(tmp_path), settings_of(TrainSettings, steps=1), tmp_path, 0, False, silent)


def test_only_whole_checkpoints_count(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / FINISHED).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoints" / "checkpoint-10")


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("more_rows", [0, 5])
def test_a_stage_that_was_killed_after_its_last_checkpoint_ends_with_the_same_weights(tmp_path, kind, more_rows):
    whole = run(kind, tmp_path, more_rows=more_rows)
    assert last_checkpoint(tmp_path).endswith(f"checkpoint-{STEPS}")
    log = log_of(tmp_path)
    assert same(run(kind, tmp_path, more_rows=more_rows), whole)
    assert log_of(tmp_path) == log


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that does `work`; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def keep(kind: str, folder: Path) -> Callable[[], None]:
    """Run a stage to its end and keep its weights."""
    return lambda: save_file(run(kind, folder), folder / "result.safetensors")


def hang(kind: str, folder: Path) -> Callable[[], None]:
    """Run a stage and stop in the middle of step 5, when there are checkpoints of steps 2 and 4."""

    def report(done: int, total: int, **figures: float) -> None:
        if done == 5:
            (folder / "hangs").touch()
            time.sleep(600)

    return lambda: run(kind, folder, report)


def wait_for(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def interrupt_runs(folder: Path) -> None:
    """In a process of its own: each stage without interruption, killed and resumed, and with a spoiled checkpoint."""
    gc.freeze()
    for kind in ("align", "distill"):
        wait_for(in_child(keep(kind, folder / kind / "whole")))
        child = in_child(hang(kind, folder / kind / "killed"))
        until = time.monotonic() + 60
        while not (folder / kind / "killed" / "hangs").exists():
            assert time.monotonic() < until and os.waitpid(child, os.WNOHANG) == (0, 0), "it never got to step 5"
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        shutil.copytree(folder / kind / "killed", folder / kind / "spoiled")
        newest = folder / kind / "spoiled" / "checkpoints" / "checkpoint-4"
        (newest / FINISHED).unlink()
        (newest / "trainable.safetensors").write_bytes(b"cut short")
        (newest / "optimizer.pt").unlink()
        for name in ("killed", "spoiled"):
            wait_for(in_child(keep(kind, folder / kind / name)))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    command = f"import pathlib, test_training; test_training.interrupt_runs(pathlib.Path({str(folder)!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["killed", "spoiled"])
@pytest.mark.parametrize("kind", ["align", "distill"])
def test_a_killed_stage_that_goes_on_ends_with_exactly_the_same_weights(interrupted, kind, name):
    """Killed in step 5: `killed` goes on from step 4; `spoiled` has no whole checkpoint after step 2."""
    whole, resumed = (load_file(interrupted / kind / run / "result.safetensors") for run in ("whole", name))
    assert same(whole, resumed)
    logs = [log_of(interrupted / kind / run) for run in ("whole", name)]
    assert [entry["step"] for entry in logs[1]] == list(range(1, STEPS + 1))
    assert logs[0] == logs[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_training_moved_the_weights_that_were_compared(interrupted):
    start = small_morphable(0).branch_state()
    end = load_file(interrupted / "align" / "whole" / "result.safetensors")
    assert all(not torch.equal(end[name], weight) for name, weight in start.items())


def test_a_gradient_that_is_not_finite_outside_of_layers_is_named():
    student, _ = student_and_teacher()
    student.requires_grad_(True)
    watch = Watch(student)
    for weight in student.parameters():
        weight.grad = torch.zeros_like(weight)
    watch.check_gradients(1)
    student.model.norm.weight.grad[0] = torch.inf
    with pytest.raises(UserError, match="not finite at step 2, in the embedding, the head or the last norm;"):
        watch.check_gradients(2)
    student.model.layers[1].mlp.up_proj.weight.grad[0] = torch.inf
    with pytest.raises(UserError, match="not finite at step 3, in layer 1;"):
        watch.check_gradients(3)
