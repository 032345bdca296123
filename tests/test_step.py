"""A step teaches the mean of all its learnt tokens, however it is cut and dealt out; without dropout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_qwen3, small_morphable
from test_training import LENGTH, SETTINGS, log_of, settings_of
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from flashmorph.convert.in_memory import transplant
from flashmorph.convert.save import save_model
from flashmorph.losses import top_log_probabilities
from flashmorph.model.sharding import shard_loss, shard_morphable, shard_student, whole
from flashmorph.plan import Budget
from flashmorph.progress import silent
from flashmorph.stages import collate, distill, extend
from flashmorph.stages.align import AlignmentLoss
from flashmorph.stages.distill import DistillationLoss, StoredDistillationLoss
from flashmorph.stages.dropout import without_dropout
from flashmorph.stages.extend import NextTokenLoss
from flashmorph.stages.settings import IsolatedTrainSettings
from flashmorph.stages.training import train

KINDS = ("align", "distill", "logits", "extend")
ALONE = {"logits": StoredDistillationLoss, "extend": NextTokenLoss}
"""Losses that need no teacher beside the student."""
ROWS = 8
CPU = torch.device("cpu")


def student_and_teacher(**changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    morphable, (teacher, _) = small_morphable(0, **changes), transplant(random_qwen3(1, **changes))
    plan = morphable.space(Budget("layers", 1)).plan(["layers.1"], Budget("layers", 1))
    return morphable.instantiate(plan), teacher


class UnevenRows(Dataset[dict[str, Any]]):
    """Rows of which one learns a single token, one all, one none, and the others some; with documents of any length."""

    def __init__(self, with_logits: bool = False):
        rng = np.random.default_rng(0)
        self._rows: list[dict[str, Any]] = []
        for number in range(ROWS):
            learnt = [{5}, set(range(LENGTH)), set()][number] if number < 3 else {3, *range(LENGTH - number, LENGTH)}
            starts = [0, *sorted(rng.choice(np.arange(1, LENGTH), number % 4, replace=False).tolist())]
            ignored = [token for token in range(LENGTH) if token not in learnt]
            ids = rng.integers(97, size=LENGTH).tolist()
            self._rows.append({"input_ids": ids, "starts": starts, "ignored": ignored})
        if with_logits:
            logits = torch.from_numpy(3 * rng.standard_normal((ROWS, LENGTH, 97))).float()
            kept = [top_log_probabilities(each, 8) for each in logits]
            for row, (values, indices) in zip(self._rows, kept, strict=True):
                row |= {"values": values.numpy(), "indices": indices.numpy()}

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._rows[row]


def loss_of(kind: str, sharded: bool = False) -> nn.Module:
    """The loss of a stage on a small model; `sharded` with its weights divided among the processes."""
    if kind == "align":
        morphable = shard_morphable(small_morphable(0), CPU) if sharded else small_morphable(0)
        for weights in morphable.branch_parameters():
            for weight in weights:
                weight.requires_grad_(True)
        return AlignmentLoss(morphable)
    student, teacher = student_and_teacher()
    student.requires_grad_(True)
    if sharded:
        shard_student(student, CPU)
    loss = DistillationLoss(student, teacher) if kind == "distill" else ALONE[kind](student)
    shard_loss(loss, student)
    return loss


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


class _Keeps(TrainerCallback):
    def __init__(self, model: nn.Module):
        self.model, self.gradients = model, {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = gradients_of(self.model)


def step_of(
    kind: str, folder: Path, micro_rows: int | None, sharded: bool = False
) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients that one step hands to the optimiser, whole in the first process; and the loss that it logs."""
    model = loss_of(kind, sharded)
    micro = micro_rows and micro_rows * LENGTH
    settings = settings_of(IsolatedTrainSettings, steps=1, rows=ROWS, micro_batch_tokens=micro)
    keeps = _Keeps(model)
    train(model, UnevenRows(kind == "logits"), settings, folder, 0, False, silent, [keeps], clip=False)
    return whole(keeps.gradients), log_of(folder)[0]["loss"]


def expected(kind: str) -> tuple[dict[str, torch.Tensor], float]:
    """The same of the formula, all rows at once."""
    model, rows = loss_of(kind), UnevenRows(kind == "logits")
    loss = model.train()(**collate([rows[row] for row in range(ROWS)]))["loss"]
    loss.backward()
    return gradients_of(model), loss.item()


def assert_same(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert found.keys() == other.keys() and found
    largest = max(each.abs().max().item() for each in other.values())
    for name, gradient in other.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("micro_rows", [1, 2, 4, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_teaches_the_mean_of_all_its_learnt_tokens(tmp_path, kind, micro_rows):
    (found, logged), (wanted, loss) = step_of(kind, tmp_path, micro_rows), expected(kind)
    assert logged == pytest.approx(loss, rel=1e-4)
    assert_same(found, wanted)


def test_a_step_without_a_learnt_token_teaches_nothing(tmp_path):
    rows = UnevenRows()
    rows._rows = [{**rows[2]} for _ in range(ROWS)]
    model = loss_of("extend")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = settings_of(IsolatedTrainSettings, steps=1, rows=ROWS, micro_batch_tokens=2 * LENGTH)
    train(model, rows, settings, tmp_path, 0, False, silent)
    assert log_of(tmp_path)[0]["loss"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["distill", "logits", "extend"])
def test_dropout_of_the_teachers_configuration_is_off(kind, again):
    student, teacher = student_and_teacher(attention_dropout=0.5)
    plain, _ = student_and_teacher()
    found = []
    for model in (student, student, plain):
        model.requires_grad_(True).zero_grad()
        if again:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = ALONE[kind](model) if kind in ALONE else DistillationLoss(model, teacher.eval())
        rows = UnevenRows(kind == "logits")
        loss.train()(**collate([rows[row] for row in range(ROWS)]))["loss"].backward()
        reruns = [module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()]
        assert any(reruns) == again
        found.append(gradients_of(model))
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())
    assert student.config.attention_dropout == 0.5


@pytest.mark.parametrize("bf16", [False, True])
def test_branches_that_run_once_have_the_gradients_of_those_that_run_again(bf16):
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (True, False):
        morphable = small_morphable(0)
        weights = [weight.requires_grad_(True) for weights in morphable.branch_parameters() for weight in weights]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            AlignmentLoss(morphable, recompute)(ids)["loss"].backward()
        results.append([weight.grad for weight in weights])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_targets_of_alignment_know_no_dropout():
    ids = torch.randint(97, (2, LENGTH))
    found = [AlignmentLoss(small_morphable(0, attention_dropout=rate)).train()(ids)["errors"] for rate in (0.5, 0.0)]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["distill", "extend"])
def test_what_is_saved_keeps_the_teachers_dropout(tmp_path, kind):
    student, teacher = student_and_teacher(attention_dropout=0.5)
    teacher.save_pretrained(tmp_path / "host")
    settings: Any = settings_of(SETTINGS[kind], steps=1, rows=ROWS)
    if kind == "distill":
        distill(student, teacher, UnevenRows(), settings, tmp_path / "stage")
    else:
        extend(student, UnevenRows(), settings, tmp_path / "stage")
    save_model(student, tmp_path / "model", tmp_path / "host")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_dropout"] == 0.5


def test_layers_of_dropout_lose_it_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    x = torch.ones(1, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(without_dropout(model)(x), model(x)) and model.training
