"""One GPU of several, by its number. What needs two GPUs is in test_gpu.py; here CUDA's answers are made up."""

import os

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from test_cli import refused
from transformers import Trainer

from flashmorph import distributed
from flashmorph.devices import pick_device
from flashmorph.errors import UserError
from flashmorph.stages.placement import arguments_on


@pytest.fixture
def current(monkeypatch) -> list[int | None]:
    """A machine with three GPUs; the numbers of those that were made the current one."""
    made: list[int | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(torch.device(device).index))
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_gpu_by_its_number_becomes_the_current_one(current):
    assert pick_device("cuda:2") == torch.device("cuda", 2) and current == [2]
    assert pick_device("cuda") == pick_device("auto") == torch.device("cuda") and current == [2]
    with pytest.raises(UserError, match="no device cuda:3 here; there are cuda:0 to cuda:2"):
        pick_device("cuda:3")


@pytest.mark.parametrize(
    "name", ["cuda:", "cuda:-1", "cuda:one", "cuda:1:1", "cuda:²", "cpu:0", "mps:1", "gpu", "", ":1"]
)
def test_names_of_no_device(current, name):
    with pytest.raises(UserError, match="there are auto, cpu, cuda, cuda:N"):
        pick_device(name)
    assert current == []


def test_a_machine_without_a_gpu(monkeypatch, tmp_path, teacher_folder, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("transplant", "morph"):
        options = (command, teacher_folder, "--output", tmp_path / "out", "--device", "cuda:1")
        assert "there is no cuda device here" in refused(capsys, *options)
    assert not (tmp_path / "out").exists()


def test_several_processes_have_their_own(current, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give --device cuda in place of cuda:1"):
        distributed.join(pick_device("cuda:1"))


def test_trainer_stays_on_the_model_s_gpu(current, tmp_path, monkeypatch):
    """By itself it moves the model of a single process to the first GPU."""
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    plain = arguments_on(torch.device("cuda"), output_dir=str(tmp_path))
    assert plain.device == torch.device("cuda", 0) and plain.n_gpu == 1
    device = torch.device("cuda", 1)
    arguments = arguments_on(device, output_dir=str(tmp_path))
    assert arguments.device == Accelerator().device == PartialState().device == device
    assert arguments.n_gpu == 1 and current[-1] == 1 and "ACCELERATE_TORCH_DEVICE" not in os.environ
    moved = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, to: moved.append(to))
    assert Trainer(torch.nn.Linear(1, 1), arguments).accelerator.device == device and moved == [device]
