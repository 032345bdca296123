"""Documents in one row are kept apart: in attention, linear state and convolution, in every stage that trains."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as modelling
from conftest import random_qwen3, small_morphable

from flashmorph.hosts import HOSTS
from flashmorph.hosts.kernels import convolve_apart, in_one_row
from flashmorph.losses import forward_kl, next_token_loss
from flashmorph.move import transplant
from flashmorph.packing import Packed, apart, cut, how_apart, marked
from flashmorph.plan import Budget
from flashmorph.recipe import load_recipe
from flashmorph.rundata import training_settings
from flashmorph.stages import AlignSettings, collate
from flashmorph.stages.align import AlignmentLoss
from flashmorph.stages.distill import DistillationLoss
from flashmorph.stages.extend import NextTokenLoss

LENGTH = 90
STARTS = ((0, 7, 75, 76), (0, 30))
"""Documents of 7, 68, 1 and 14 tokens, and of 30 and 60."""


def packed_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        starts[row, list(places)] = True
    return ids, starts


def documents(ids: torch.Tensor) -> list[torch.Tensor]:
    """Each document as a batch of its own, `[1, time]`."""
    ends = [[*places[1:], LENGTH] for places in STARTS]
    return [
        ids[row, start:stop][None]
        for row, places in enumerate(STARTS)
        for start, stop in zip(places, ends[row], strict=True)
    ]


def morphable_model():
    """Branches start with convolutions of the current token alone: these look back, so that they could leak."""
    morphable = small_morphable(0)
    with torch.no_grad():
        for layer in morphable.layers:
            layer.branches["linear"].conv1d.weight.normal_(generator=torch.Generator().manual_seed(1))
    return morphable


def hybrid(*full: str):
    morphable = morphable_model()
    budget = Budget("layers", max(1, len(full)))
    return morphable.instantiate(morphable.space(budget).plan(full, budget)).requires_grad_(False)


def in_place(places: list[Packed], values: list[torch.Tensor]) -> torch.Tensor:
    """`values` of each batch's tokens, `[tokens, width]`, where the tokens stood: `[rows, LENGTH, width]`."""
    found = values[0].new_full((2 * LENGTH, values[0].shape[-1]), torch.nan)
    for place, value in zip(places, values, strict=True):
        found[place.tokens(place.input_ids)] = value
    return found.view(2, LENGTH, -1)


def run_apart(decoder, ids: torch.Tensor, starts: torch.Tensor | None, way=None) -> torch.Tensor:
    """Last hidden states `[rows, time, width]`, each where its token stood."""

    def batches(values: torch.Tensor) -> list[Packed]:
        return way(values, starts) if way else apart(values, starts, HOSTS[0])

    found = batches(ids)
    return in_place(
        batches(torch.arange(ids.numel(), device=ids.device).view_as(ids)), [each.run(decoder) for each in found]
    )


def branch_outputs(ids: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """What alignment compares: every layer's attention and linear branch, `[rows, time, values]`."""
    morphable = morphable_model()
    batches = apart(ids, starts, morphable.host)
    places = apart(torch.arange(ids.numel()).view_as(ids), starts, morphable.host)
    found = []
    for each in batches:
        outputs = []
        with morphable.observed(
            lambda layer, hidden, arguments, output, outputs=outputs: outputs.extend(
                [output, layer.branch("linear", hidden, arguments)]
            )
        ):
            morphable(each.input_ids, boundaries=each.boundaries)
        found.append(torch.cat([each.tokens(output) for output in outputs], 1))
    return in_place(places, found)


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and the same with one token of the second document changed."""
    ids, _ = packed_rows(seed)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    return ids, changed


RUNS = {
    "align": branch_outputs,
    "distill and extend, full above linear": lambda *rows: run_apart(hybrid("layers.1").model, *rows),
    "distill and extend, linear above full": lambda *rows: run_apart(hybrid("layers.0").model, *rows),
    "the teacher": lambda *rows: run_apart(transplant(random_qwen3(0))[0].model, *rows),
}


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_a_planted_token_moves_nothing_outside_its_document(name):
    _, starts = packed_rows()
    before, after = (RUNS[name](ids, starts) for ids in planted())
    moved = (before != after).any(-1)
    assert not torch.isnan(before).any()
    assert moved[0, 12:75].all()
    assert not moved[0, :12].any() and not moved[0, 75:].any() and not moved[1].any()
    joined = (RUNS[name](planted()[0], None) != RUNS[name](planted()[1], None)).any(-1)
    assert joined[0, 75:].any(), "without boundaries nothing would leak either: this shows nothing"


@pytest.mark.parametrize("full", [("layers.0",), ("layers.1",)])
@torch.no_grad()
def test_a_document_in_a_row_is_computed_as_if_it_were_alone(full):
    model = hybrid(*full)
    ids, starts = packed_rows()
    alone = [model.model(input_ids=document, use_cache=False).last_hidden_state[0] for document in documents(ids)]
    torch.testing.assert_close(
        run_apart(model.model, ids, starts).flatten(0, 1), torch.cat(alone), rtol=1e-4, atol=1e-5
    )


def test_losses_are_those_of_the_documents():
    ids, starts = packed_rows()
    student, (teacher, _) = hybrid("layers.1"), transplant(random_qwen3(0))
    apart_ids = documents(ids)
    divergences, losses = [], []
    for document in apart_ids:
        hidden, target = (
            model.model(input_ids=document, use_cache=False).last_hidden_state for model in (student, teacher)
        )
        divergences.append(len(document[0]) * forward_kl(hidden, student.lm_head, target, teacher.lm_head))
        if len(document[0]) > 1:
            losses.append((len(document[0]) - 1) * next_token_loss(hidden, student.lm_head, document))
    labels = ids.numel() - len(apart_ids)
    found = DistillationLoss(student, teacher)(ids, starts)["loss"]
    torch.testing.assert_close(found, sum(divergences) / ids.numel(), rtol=1e-4, atol=1e-5)
    found = NextTokenLoss(student)(ids, starts)["loss"]
    torch.testing.assert_close(found, sum(losses) / labels, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_alignment_sums_over_documents_before_it_divides():
    ids, starts = packed_rows()
    outputs = branch_outputs(ids, starts).double().unflatten(-1, (2, 2, -1)).flatten(0, 1)
    attention, branch = outputs[:, :, 0], outputs[:, :, 1]
    expected = (branch - attention).square().sum((0, 2)) / attention.square().sum((0, 2))
    found = AlignmentLoss(morphable_model())(ids, starts)["errors"].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_do_not_cross_a_boundary():
    model = hybrid("layers.1")
    ids, starts = packed_rows()
    embedded = model.model.embed_tokens(ids).detach().requires_grad_(True)
    model.model.embed_tokens.register_forward_hook(lambda *_: embedded_part[0])
    embedded_part = [None]
    total = 0
    places = cut(torch.arange(ids.numel(), device=ids.device).view_as(ids), starts)
    for each, place in zip(cut(ids, starts), places, strict=True):
        embedded_part[0] = embedded.flatten(0, 1)[place.input_ids]
        inside = (place.tokens(place.input_ids) >= 7) & (place.tokens(place.input_ids) < 75)
        total = total + each.run(model.model)[inside].square().sum()
    total.backward()
    reached = embedded.grad.abs().sum(-1) > 0
    assert reached[0, 7:75].all() and reached.sum() == 68


def test_less_than_half_is_padding_and_nothing_is_lost():
    ids, starts = packed_rows()
    batches = cut(ids, starts)
    assert sum(int(each.real.sum()) for each in batches) == ids.numel()
    assert all(each.real.float().mean(1).min() > 0.5 for each in batches)
    tokens = torch.cat([each.tokens(each.input_ids) for each in batches])
    assert torch.equal(tokens.sort().values, ids.flatten().sort().values)


def test_rows_of_one_document_go_through_as_they_are():
    ids, _ = packed_rows()
    (only,) = apart(ids, None, HOSTS[0])
    assert only.input_ids is ids and not only.boundaries
    places, following = only.next_tokens()
    assert torch.equal(following, ids[:, 1:].flatten()) and len(places) == ids.numel() - 2
    batch = collate([{"input_ids": row.tolist(), "starts": [0]} for row in ids])
    assert set(batch) == {"input_ids"}


def test_boundaries_are_never_dropped_in_silence():
    """A CPU cuts rows; the form for kernels is refused there, by a hybrid and by a branch."""
    ids, starts = packed_rows()
    with pytest.raises(ValueError, match="packed sequences"):
        marked(ids, starts).run(hybrid("layers.1").model)
    with pytest.raises(ValueError, match="packed sequences"):
        morphable = morphable_model()
        morphable(ids, torch.full((2, 2), 0.5), marked(ids, starts).boundaries)
    assert how_apart(True, HOSTS[0], torch.device("cpu")) == "apart, rows cut at the boundaries"
    assert how_apart(False, HOSTS[0], torch.device("cpu")) == "joined"


@torch.no_grad()
def test_attention_takes_the_boundaries_that_kernels_are_given():
    teacher, _ = transplant(random_qwen3(0))
    ids, starts = packed_rows()
    found = run_apart(teacher.model, ids, starts, way=lambda *rows: [marked(*rows)])
    torch.testing.assert_close(found, run_apart(teacher.model, ids, starts), rtol=1e-4, atol=1e-5)


def delta_rule_kernel(query, key, value, g, beta, cu_seqlens, **settings):
    """What flash-linear-attention's kernel does with packed documents: one row, each document by itself."""
    assert len(query) == 1
    reference = modelling.torch_chunk_gated_delta_rule.decorated.__wrapped__
    pieces = [slice(start, stop) for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    settings = {name: settings[name] for name in ("use_qk_l2norm_in_kernel",) if name in settings}
    parts = [reference(query[:, p], key[:, p], value[:, p], g[:, p], beta[:, p], **settings)[0] for p in pieces]
    return torch.cat(parts, 1), None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Makes this CPU take the path of a GPU whose kernels take boundaries."""

    def switch() -> None:
        rule, convolution = modelling.torch_chunk_gated_delta_rule, modelling.causal_conv1d_fn

        def delta_rule(*args, **kwargs):
            return (
                in_one_row(delta_rule_kernel, *args, **kwargs)
                if kwargs["cu_seqlens"] is not None
                else rule(*args, **kwargs)
            )

        def convolve(*args, **kwargs):
            return convolve_apart(*args, **kwargs) if "seq_idx" in kwargs else convolution(*args, **kwargs)

        delta_rule.decorated = rule.decorated
        monkeypatch.setattr(modelling, "torch_chunk_gated_delta_rule", delta_rule)
        monkeypatch.setattr(modelling, "causal_conv1d_fn", convolve)
        monkeypatch.setattr(type(HOSTS[0]), "takes_boundaries", lambda self, device: True)

    return switch


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_boundaries_reach_every_kind_of_layer(name, as_on_a_gpu):
    ids, starts = packed_rows()
    expected = RUNS[name](ids, starts)
    as_on_a_gpu()
    torch.testing.assert_close(RUNS[name](ids, starts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("time", [2, 40])
def test_the_convolution_of_packed_rows_is_that_of_each_document(time, bias):
    hidden, weight = torch.randn(2, 6, time), torch.randn(6, 4)
    added = torch.randn(6) if bias else None
    seq_idx = torch.stack([(torch.arange(time) >= 1).int(), (torch.arange(time) >= 17).int() + 3])
    found = convolve_apart(hidden, weight, added, "silu", seq_idx=seq_idx)
    for row in range(2):
        for number in seq_idx[row].unique():
            alone = hidden[row : row + 1, :, seq_idx[row] == number]
            expected = modelling.causal_conv1d_fn(alone, weight, added, activation="silu")
            torch.testing.assert_close(found[row : row + 1, :, seq_idx[row] == number], expected)


def test_what_was_trained_without_isolation_keeps_its_digest():
    run: Any = SimpleNamespace(recipe=load_recipe("default"), bf16=True)
    on, off = (AlignSettings(isolate_documents=isolate) for isolate in (True, False))
    assert training_settings(run, on)["train"] == {**off.model_dump(mode="json"), "isolate_documents": True}
    assert "isolate_documents" not in training_settings(run, off)["train"]


def test_demo_trains_on_rows_as_when_it_was_measured_and_default_on_documents_apart():
    demo, default = load_recipe("demo"), load_recipe("default")
    assert not any(stage.isolate_documents for stage in (demo.align, demo.distill, demo.extend))
    assert all(stage.isolate_documents for stage in (default.align, default.distill, default.extend))
    assert AlignSettings().isolate_documents
