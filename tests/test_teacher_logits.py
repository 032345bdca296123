"""Distillation from logits on disk: the same loss, with nothing lost at the largest k, and safe to kill."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FEW_STEPS, random_qwen3, run_command

import flashmorph.losses as losses
import flashmorph.stages.teacher_logits as teacher_logits
from flashmorph.convert.in_memory import transplant
from flashmorph.convert.load import load_model
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.stages import DistillSettings, RowsWithLogits, collate, distill, write_logits
from flashmorph.stages.distill import DistillationLoss, StoredDistillationLoss

VOCABULARY, LENGTH, NUMBER = 97, 24, 8
SETTINGS = DistillSettings(
    tokens=LENGTH * NUMBER, length=LENGTH, batch_tokens=2 * LENGTH, learning_rate=1e-3, warmup_steps=0
)


@pytest.fixture
def rows(tmp_path) -> Rows:
    """Rows of random tokens, some of them with several documents."""
    generator = np.random.default_rng(0)
    ids = generator.integers(VOCABULARY, size=(NUMBER, LENGTH)).astype(np.uint32)
    ids[:, 0] |= 1 << 31
    ids[::2, [5, 17]] |= 1 << 31
    np.save(tmp_path / "rows.npy", ids)
    return Rows(tmp_path / "rows.npy")


def host(seed: int):
    return transplant(random_qwen3(seed))[0]


def batch(rows, *numbers: int) -> dict[str, torch.Tensor]:
    return collate([rows[number] for number in numbers])


@pytest.mark.parametrize("numbers", [(1, 3), (0, 2)], ids=["a document a row", "several"])
def test_with_the_whole_vocabulary_the_loss_is_that_beside_the_teacher(rows, tmp_path, numbers):
    """To the last bit, in value and gradient."""
    teacher, student = host(0), host(1).requires_grad_(True)
    write_logits(teacher, rows, SETTINGS, VOCABULARY, tmp_path)
    stored = RowsWithLogits(rows, tmp_path)
    found = StoredDistillationLoss(student)(**batch(stored, *numbers))["loss"]
    expected = DistillationLoss(student, teacher)(**batch(rows, *numbers))["loss"]
    assert found > 0.01 and torch.equal(found, expected)
    weights = list(student.parameters())
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("top_k", [1, 7, VOCABULARY - 1])
@pytest.mark.parametrize("tokens_at_once", [1, 5, 1000])
def test_all_other_tokens_are_taken_as_one(monkeypatch, top_k, tokens_at_once):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * VOCABULARY * tokens_at_once)
    head = torch.nn.Linear(8, VOCABULARY, bias=False)
    student, logits = (torch.randn(11, 8) * 3).requires_grad_(True), torch.randn(11, VOCABULARY) * 3
    found = losses.top_kl(student, head, *losses.top_log_probabilities(logits, top_k))
    p, q = logits.double().softmax(-1), head(student).double().softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    merged = [torch.cat([each[:, :top_k], each[:, top_k:].sum(-1, keepdim=True)], -1) for each in (p, q)]
    expected = (merged[0] * (merged[0] / merged[1]).log()).sum(-1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found <= (p * (p / q).log()).sum(-1).mean() + 1e-6
    one, other = torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_rest_too_small_for_one_minus_the_others_is_kept():
    logits = torch.tensor([[30.0, 29.0, 0.0, -1.0]])
    values, indices = losses.top_log_probabilities(logits, 2)
    assert indices.tolist() == [[0, 1]]
    expected = logits.double().log_softmax(-1)[0, 2:].logsumexp(0)
    assert values[0, -1].item() == pytest.approx(expected.item(), rel=1e-5) and expected < -29
    student = torch.eye(4)[:1].requires_grad_(True)
    losses.top_kl(student, torch.nn.Linear(4, 4), values, indices).backward()
    assert torch.isfinite(student.grad).all()


def test_interrupted_writing_goes_on_with_the_same_result(rows, tmp_path, monkeypatch):
    teacher = host(0)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    write_logits(teacher, rows, SETTINGS, 5, tmp_path / "whole")
    monkeypatch.setattr(teacher_logits, "_WRITE_SECONDS", -1)

    class Killed(Exception):
        pass

    def kill(done: float, total: float, **figures: float) -> None:
        if done >= 4:
            raise Killed

    with pytest.raises(Killed):
        write_logits(teacher, rows, SETTINGS, 5, tmp_path / "cut", report=kill)
    read: list[int] = []

    class Watched(Rows):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    write_logits(teacher, Watched(tmp_path / "rows.npy"), SETTINGS, 5, tmp_path / "cut")
    assert read == [4, 5, 6, 7]
    for name in ("log_probabilities.npy", "places.npy"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_it_takes_the_space_that_it_says_before_the_first_row(rows, tmp_path, monkeypatch):
    said = teacher_logits.logits_on_disk(SETTINGS, 5)
    assert f"{LENGTH * NUMBER:,} tokens of 44 bytes" in said
    write_logits(host(0), rows, SETTINGS, 5, tmp_path)
    headers = 2 * 128
    size = sum((tmp_path / name).stat().st_size for name in ("log_probabilities.npy", "places.npy"))
    assert size == LENGTH * NUMBER * 44 + headers

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_logits.os, "posix_fallocate", full)
    (tmp_path / "full").mkdir()
    with pytest.raises(OSError, match="No space left"):
        write_logits(host(0), rows, SETTINGS, 5, tmp_path / "full")


def test_more_than_the_vocabulary_is_refused(rows, tmp_path):
    with pytest.raises(UserError, match="top_k is 98; the teacher's vocabulary has 97"):
        write_logits(host(0), rows, SETTINGS, 98, tmp_path)


def test_training_towards_them_is_training_towards_the_teacher(rows, tmp_path):
    teacher, whole, stored = host(0), host(1), host(1)
    write_logits(teacher, rows, SETTINGS, VOCABULARY, tmp_path)
    distill(whole, teacher, rows, SETTINGS, tmp_path / "online")
    distill(stored, None, RowsWithLogits(rows, tmp_path), SETTINGS, tmp_path / "offline")
    for one, other in zip(stored.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_run_writes_them_once_and_says_how_large_they_are(teacher_folder, recipe_file, tmp_path, capsys):
    """Also from a teacher in many files."""
    teacher = tmp_path / "teacher"
    load_model(teacher_folder, torch.bfloat16).save_pretrained(teacher, max_shard_size="20KB")
    for path in teacher_folder.glob("tokenizer*"):
        shutil.copy2(path, teacher)
    options = ("morph", teacher, "--recipe", recipe_file, "--set", "distill.teacher_logits.top_k=9")
    assert run_command(*options, "--output", tmp_path / "out", "--dry-run", "--json") == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["stage"] == "logits"]
    assert "512 tokens of 76 bytes" in row["data"] and row["tokens"] == FEW_STEPS["distill"]["tokens"]
    assert run_command(*options, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "512 tokens of 76 bytes" in printed.out + printed.err
    (folder,) = (tmp_path / "out" / "stages").glob("logits-*")
    assert np.load(folder / "log_probabilities.npy", mmap_mode="r").shape == (8, 64, 10)
    assert len(list((tmp_path / "out" / "stages").glob("transplant-*/model/*.safetensors"))) == 2
    digest = folder.name.removeprefix("logits-")
    for stage in (tmp_path / "out" / "stages").glob("distill-*/stage.json"):
        assert json.loads(stage.read_text())["inputs"][1:] == [digest]
