"""What the settings of a stage that trains do: rates, clipping, memory, checkpoints, documents."""

import gc
import importlib
import weakref
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
from test_step import UnevenRows, _Keeps
from test_training import SETTINGS, CountsRows, log_of, rows_in, run, settings_of, small_morphable
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer

from flashmorph.errors import UserError
from flashmorph.progress import silent
from flashmorph.recipe.recipe import load_recipe
from flashmorph.stages import AlignSettings, DistillSettings, ExtendSettings, align, trainer
from flashmorph.stages.checkpoints import drop_damaged, finish, last_checkpoint
from flashmorph.stages.settings import TrainSettings
from flashmorph.stages.trainer import StageTrainer
from flashmorph.stages.training import train


def saved_steps(folder) -> set[int]:
    return {int(place.name.rpartition("-")[2]) for place in folder.glob("checkpoints/checkpoint-*")}


@pytest.mark.parametrize("end", [1e-3, 1e-2])
def test_the_rate_rises_and_falls_to_its_end(tmp_path, end):
    settings = settings_of(
        TrainSettings,
        steps=20,
        rows=1,
        learning_rate=1e-2,
        final_learning_rate=end,
        warmup_steps=99,
        checkpoint_steps=20,
    )
    train(CountsRows(), rows_in(tmp_path, settings.rows), settings, tmp_path, 0, False, silent)
    rates = [entry["learning_rate"] for entry in log_of(tmp_path)]
    top = rates.index(max(rates))
    assert rates[0] == 0 and rates[: top + 1] == sorted(rates[: top + 1])
    # A warm-up takes a quarter of the steps at most.
    assert max(rates) == pytest.approx(1e-2) and top == 5
    assert rates[top:] == sorted(rates[top:], reverse=True) and 0.999 * end <= rates[-1] <= 1.2 * end


def test_a_gradient_is_clipped_as_a_whole(tmp_path):
    model = CountsRows()
    keeps = _Keeps(model)
    settings = settings_of(TrainSettings, steps=1, max_grad_norm=0.1)
    train(model, rows_in(tmp_path, settings.rows), settings, tmp_path, 0, False, silent, [keeps])
    assert keeps.gradients["weight"].norm().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(("kind", "apart"), [(DistillSettings, True), (ExtendSettings, False)])
def test_documents_stand_as_the_stage_says(tmp_path, kind, apart):
    seen = []

    class Sees(CountsRows):
        def forward(self, input_ids, starts=None, loss_mask=None):
            seen.append(starts is not None)
            return super().forward(input_ids)

    train(Sees(), UnevenRows(), settings_of(kind, steps=1, rows=8), tmp_path, 0, False, silent)
    assert set(seen) == {apart}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("again", [True, False])
def test_layers_run_again_where_that_is_set(tmp_path, monkeypatch, kind, again):
    seen = []

    def see(loss, *_, **__):
        modules = [getattr(each, "gradient_checkpointing", False) for each in loss.modules()]
        seen.append(loss._recompute if kind == "align" else any(modules))

    monkeypatch.setattr(importlib.import_module(f"flashmorph.stages.{kind}"), "train", see)
    run(kind, tmp_path, activation_checkpointing=again)
    assert seen == [again]


def test_nothing_holds_the_weights_of_a_stage_that_is_done(tmp_path):
    """Under autocast accelerate ties a model to itself; the next stage needs its memory."""
    settings = settings_of(AlignSettings, steps=1)
    gc.disable()
    try:
        morphable = small_morphable(0)
        align(morphable, rows_in(tmp_path, settings.rows), settings, tmp_path, 0, True)
        held = weakref.ref(morphable.layers[0])
        del morphable
        assert held() is None
    finally:
        gc.enable()


def test_a_checkpoint_is_written_in_time_however_long_steps_take(tmp_path, monkeypatch):
    """Ten minutes a step: every fourth step is later than half an hour after the checkpoint before it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("flashmorph.stages.training.time.monotonic", lambda: clock.now)
    monkeypatch.setattr("flashmorph.stages.training._KEPT_CHECKPOINTS", None)

    class TakesMinutes(CountsRows):
        def forward(self, input_ids):
            clock.now += 601.0
            return super().forward(input_ids)

    settings = settings_of(TrainSettings, steps=8, checkpoint_steps=100)
    monkeypatch.setattr("flashmorph.stages.training._require_disk", lambda *given: None)
    train(TakesMinutes(), rows_in(tmp_path, settings.rows), settings, tmp_path, 0, False, silent)
    assert saved_steps(tmp_path) == {3, 6, 8}


def test_no_stage_begins_without_room_for_its_checkpoints(tmp_path, monkeypatch):
    free = SimpleNamespace(free=3 * 12 * 3 - 1)
    monkeypatch.setattr("flashmorph.stages.training.shutil.disk_usage", lambda folder: free)
    settings = settings_of(TrainSettings, steps=6, checkpoint_steps=2)
    with pytest.raises(UserError, match="its checkpoints need 108.0 B more in .* where 107.0 B are free"):
        train(CountsRows(), rows_in(tmp_path, settings.rows), settings, tmp_path, 0, False, silent)
    assert not saved_steps(tmp_path)
    train(
        CountsRows(),
        rows_in(tmp_path, settings.rows),
        settings.model_copy(update={"checkpoint_steps": 6}),
        tmp_path,
        0,
        False,
        silent,
    )
    assert saved_steps(tmp_path) == {6}


def test_a_sharded_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):  # As torch.distributed.checkpoint raises it: no Exception.
        raise CheckpointException("write", {0: (OSError(28, "No space left on device"), StackSummary())})

    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(UserError, match=r"cannot write checkpoint-2 in .*: \[Errno 28\] No space left on device; the"):
        run("distill", tmp_path)


def test_a_cut_shard_gives_way(tmp_path):
    for step in (1, 2):
        place = tmp_path / "checkpoints" / f"checkpoint-{step}"
        (place / "shards").mkdir(parents=True)
        for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            (place / "shards" / name).write_bytes(b"x" * 64)
        torch.save({"step": step}, place / "scheduler.pt")
        (place / "trainer_state.json").write_text("{}")
        finish(place)
    drop_damaged(tmp_path)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    (tmp_path / "checkpoints/checkpoint-2/shards/__1_0.distcp").write_bytes(b"x")
    drop_damaged(tmp_path)
    assert last_checkpoint(tmp_path).endswith("checkpoint-1")


def test_a_stage_that_a_recipe_leaves_out_needs_its_tokens():
    with pytest.raises(UserError, match="recipe laptop has no stage `extend`, so extend.length alone would train"):
        load_recipe("laptop", {"extend.length": 4096})
    recipe = load_recipe("laptop", {"extend.length": 4096, "extend.tokens": 1_000_000})
    assert recipe.extend.tokens == 1_000_000 and recipe.extend.checkpoint_steps == 50
    assert load_recipe("default", {"extend.length": 4096}).extend.length == 4096


def test_what_is_replaced_in_trainer_is_there(monkeypatch):
    """Also which names these are: every private one here that Trainer has too."""
    replaced = {name for name in vars(StageTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert replaced - {"compute_loss", "training_step"} == set(trainer._OF_TRAINER)
    monkeypatch.delattr(Trainer, "_save_optimizer_and_scheduler")
    with pytest.raises(UserError, match=r"has no Trainer._save_optimizer_and_scheduler, .*: install transformers 5"):
        StageTrainer(model=None, args=None, watch=None)
