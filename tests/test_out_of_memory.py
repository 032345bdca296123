"""Too little memory on the device: one sentence that says what to lower, and nothing that was done is lost."""

import pytest
import torch
from conftest import run_command

from flashmorph.errors import is_out_of_memory
from flashmorph.model.morphable import Morphable
from flashmorph.recipe.recipe import load_recipe
from flashmorph.run.out_of_memory import within_memory
from flashmorph.stages.checkpoints import last_checkpoint
from flashmorph.stages.distill import DistillationLoss

MESSAGES = {
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB"),
    "mps": (RuntimeError, "MPS backend out of memory (MPS allocated: 9.00 GB). Tried to allocate 20.00 GB"),
}


def full_after(calls: int, forward, device: str = "cuda"):
    """A forward that finds the memory full after so many calls."""
    done = []

    def run(*arguments, **named):
        done.append(None)
        if len(done) > calls:
            kind, message = MESSAGES[device]
            raise kind(message)
        return forward(*arguments, **named)

    return run


def test_a_stage_that_trains_names_its_setting_and_goes_on_once_there_is_room(
    teacher_folder, recipe_file, tmp_path, capsys, monkeypatch
):
    command = ("distill", teacher_folder, "--recipe", recipe_file, "--output", tmp_path, "--layers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(DistillationLoss, "forward", full_after(2, DistillationLoss.forward))
        assert run_command(*command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "distill ran out of memory: lower distill.micro_batch_tokens, now 128" in told
    assert "--set distill.micro_batch_tokens=64" in told and "Traceback" not in told
    (partial,) = tmp_path.glob("stages/distill-*.partial")
    assert last_checkpoint(partial).endswith("checkpoint-2")
    assert run_command(*command) == 0
    (log,) = tmp_path.glob("stages/distill-*/log.jsonl")
    assert len(log.read_text().splitlines()) == 4


def test_a_search_and_a_row_that_is_too_long_are_told(teacher_folder, recipe_file, tmp_path, capsys, monkeypatch):
    common = (teacher_folder, "--recipe", recipe_file, "--output", tmp_path)
    assert run_command("align", *common) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Morphable, "forward", full_after(0, Morphable.forward))
        assert run_command("distill", *common) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "select ran out of memory: select.search.micro_batch_tokens is one row already" in told
        assert "one row already, 96 tokens: shorter rows" in told
    with monkeypatch.context() as patch:
        patch.setattr(DistillationLoss, "forward", full_after(0, DistillationLoss.forward))
        one_row = ("--set", "distill.micro_batch_tokens=64")
        assert run_command("distill", *common, "--layers", "1", *one_row) == 2
        told = " ".join(capsys.readouterr().err.split())
        ways = "--set distill.activation_checkpointing=true or shorter rows or several GPUs (torchrun)"
        assert f"one row already, 64 tokens: {ways}" in told


@pytest.mark.parametrize("device", MESSAGES)
def test_what_one_process_must_hold_whole_is_told_where_it_can(teacher_folder, recipe_file, tmp_path, capsys, device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashmorph.pipeline.branches.write_host", full_after(0, None, device))
        assert run_command("align", teacher_folder, "--recipe", recipe_file, "--output", tmp_path) == 2
    assert "transplant ran out of memory: the model must fit as a whole" in " ".join(capsys.readouterr().err.split())


def test_other_errors_of_pytorch_stay_what_they_are():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"), within_memory("align", load_recipe("demo", {})):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_weights_to_divide_need_several_processes(teacher_folder, recipe_file, tmp_path, capsys):
    command = ("align", teacher_folder, "--recipe", recipe_file, "--output", tmp_path, "--set", "shard=true")
    assert run_command(*command) == 2
    assert "there is one: start it with torchrun" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
