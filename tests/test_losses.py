"""The losses over the vocabulary: the plain formulas, in a fixed amount of memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashmorph.losses as losses

VOCABULARY, WIDTH = 61, 8


def next_token_loss(hidden, layer, ids):
    """The loss of labels where each token predicts the one behind it; `hidden` `[batch, time, width]`."""
    return losses.label_loss(hidden[:, :-1].flatten(0, 1), layer, ids[:, 1:].flatten())


@pytest.fixture(params=[1, 7, 1000], ids="chunks of {}".format)
def chunk(request, monkeypatch) -> int:
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * VOCABULARY * request.param)
    assert losses.chunk_tokens(VOCABULARY, "cpu") == request.param
    return request.param


def head(bias: bool = False) -> nn.Linear:
    return nn.Linear(WIDTH, VOCABULARY, bias=bias)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("bias", [False, True])
def test_forward_kl_is_the_plain_formula_in_value_and_gradient(chunk, bias):
    student_head, teacher_head = head(bias), head()
    student, teacher = (torch.randn(2, 11, WIDTH) * 3 for _ in range(2))
    student.requires_grad_(True)
    found = losses.forward_kl(student, student_head, teacher, teacher_head)
    wanted = teacher_head(teacher).double().log_softmax(-1).detach()
    given = student_head(student).double().log_softmax(-1)
    expected = (wanted.exp() * (wanted - given)).sum(-1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found > 0.1
    leaves = [student, *student_head.parameters()]
    assert_same(gradients(found, *leaves), gradients(expected, *leaves))


def test_forward_kl_of_the_teacher_to_itself_is_zero(chunk):
    hidden, layer = torch.randn(2, 9, WIDTH), head()
    assert losses.forward_kl(hidden, layer, hidden, layer).item() == pytest.approx(0, abs=1e-6)


def test_forward_kl_gives_the_teacher_no_gradient(chunk):
    student_head, teacher_head = head(), head()
    student, teacher = (torch.randn(1, 9, WIDTH, requires_grad=True) for _ in range(2))
    losses.forward_kl(student, student_head, teacher, teacher_head).backward()
    assert teacher.grad is None and teacher_head.weight.grad is None
    assert student.grad is not None and student_head.weight.grad is not None


def test_forward_kl_is_the_teacher_to_student_direction():
    """A student that never says what the teacher says is punished; one that says more is not."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    sure, even = torch.tensor([[[8.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]])
    assert losses.forward_kl(even, layer, sure, layer) < 0.7 < 3 < losses.forward_kl(sure, layer, even, layer)


def test_next_token_loss_is_the_plain_formula_in_value_and_gradient(chunk):
    layer = head()
    hidden = (torch.randn(3, 12, WIDTH) * 3).requires_grad_(True)
    ids = torch.randint(VOCABULARY, (3, 12))
    found = next_token_loss(hidden, layer, ids)
    logits = layer(hidden).double()
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    leaves = [hidden, layer.weight]
    assert_same(gradients(found, *leaves), gradients(expected, *leaves))


def test_weighted_labels_are_the_plain_formula_in_value_and_gradient(chunk):
    layer, hidden, labels = head(), (torch.randn(19, WIDTH) * 3).requires_grad_(True), torch.randint(VOCABULARY, (19,))
    weights = torch.rand(19)
    found = losses.label_loss(hidden, layer, labels, weights)
    expected = (F.cross_entropy(layer(hidden).double(), labels, reduction="none") * weights).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(found, hidden, layer.weight), gradients(expected, hidden, layer.weight))


def test_next_token_loss_does_not_see_what_follows_the_last_label(chunk):
    hidden = torch.randn(1, 6, WIDTH, requires_grad=True)
    next_token_loss(hidden, head(), torch.randint(VOCABULARY, (1, 6))).backward()
    assert (hidden.grad[:, -1] == 0).all()
    assert (hidden.grad[:, :-1].abs().sum(-1) > 0).all()


def test_token_losses_are_the_plain_formula_token_by_token(chunk):
    layer, hidden, labels = head(), torch.randn(23, WIDTH) * 3, torch.randint(VOCABULARY, (23,))
    found = losses.token_losses(hidden, layer, labels)
    expected = F.cross_entropy(layer(hidden).double(), labels, reduction="none")
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


def test_losses_are_taken_in_float32_under_autocast(chunk):
    layer, other = head(), head()
    student, teacher = torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH)
    ids = torch.randint(VOCABULARY, (2, 9))
    exact = losses.forward_kl(student, layer, teacher, other), next_token_loss(student, layer, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.forward_kl(student, layer, teacher, other), next_token_loss(student, layer, ids)
    for one, another in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(another.item(), rel=0.02)


@pytest.mark.parametrize("name", ["kl", "labels"])
def test_the_heads_gradient_is_summed_in_float32_under_autocast(name, monkeypatch):
    """A large vocabulary has hundreds of chunks, and in bfloat16 each addition would round their sum."""
    torch.manual_seed(0)
    hidden, teacher, labels = torch.randn(512, 32), torch.randn(512, 32), torch.randint(VOCABULARY, (512,))
    student_head, teacher_head = nn.Linear(32, VOCABULARY, bias=False), nn.Linear(32, VOCABULARY, bias=False)

    def gradient(bf16: bool) -> torch.Tensor:
        student_head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if name == "kl":
                loss = losses.forward_kl(hidden, student_head, teacher, teacher_head)
            else:
                loss = losses.label_loss(hidden, student_head, labels)
        loss.backward()
        assert student_head.weight.grad is not None
        return student_head.weight.grad.clone()

    exact = gradient(False)
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocabulary, kind: 2)
    assert (gradient(True) - exact).norm() < 0.004 * exact.norm()


def test_a_loss_goes_backward_once():
    loss = losses.label_loss(torch.randn(4, 8, requires_grad=True), nn.Linear(8, 5), torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward before"):
        loss.backward()


def test_a_chunk_is_at_least_one_token():
    assert losses.chunk_tokens(10**12, "cpu") == 1
    assert losses.chunk_tokens(10**5, "cuda") >= 4 * losses.chunk_tokens(10**5, "cpu")


MEMORY = """
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import flashmorph.losses as losses

losses.LOGITS_BYTES = 8 * 2**20
VOCABULARY, WIDTH = 152_000, 4
student_head, teacher_head = (torch.nn.Linear(WIDTH, VOCABULARY, bias=False) for _ in range(2))
teacher, ids = torch.randn(1, 128, WIDTH), torch.randint(VOCABULARY, (1, 128))
student = torch.randn(1, 128, WIDTH, requires_grad=True)


def megabytes(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak(loss):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    start = megabytes("VmRSS")
    loss().backward()
    return megabytes("VmHWM") - start


def kl(tokens):
    return losses.forward_kl(student[:, :tokens], student_head, teacher[:, :tokens], teacher_head)


def next_token(tokens):
    return losses.label_loss(student[:, : tokens - 1].flatten(0, 1), student_head, ids[:, 1:tokens].flatten())


def plain(tokens):
    wanted = F.log_softmax(teacher_head(teacher[:, :tokens]), -1).detach()
    return F.kl_div(F.log_softmax(student_head(student[:, :tokens]), -1), wanted, log_target=True, reduction="sum")


kl(3).backward()
found = {}
for loss in (kl, next_token, plain):
    found[loss.__name__] = [peak(lambda: loss(tokens)) for tokens in (32, 128)]
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory_is_a_few_chunks_however_many_tokens_at_a_large_vocabulary():
    """A chunk is 8 MiB here, all logits of 128 tokens 74 MiB; the plain formula holds several tensors of that size.

    The threshold keeps glibc from putting chunks on its heap, where freed memory stays with the process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    megabytes = json.loads(done.stdout)
    assert megabytes["plain"][1] > 3 * 74
    for name in ("kl", "next_token"):
        few, many = megabytes[name]
        assert 8 < many < 8 * 8
        assert many < few + 8
