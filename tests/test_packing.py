"""Documents in one row are kept apart: in attention, linear state and convolution, in every stage that trains."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5.modeling_qwen3_5 as modelling
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as moe_modelling
from families import random_teacher

import flashmorph.mixers.kernels as kernels
from flashmorph.convert.in_memory import transplant
from flashmorph.data.isolation import Packed, apart, cut, how_apart, marked
from flashmorph.hosts import HOSTS, WINDOW_HOSTS, Host, configure, supports_varlen, use_kernels
from flashmorph.losses import Head, forward_kl, label_loss, top_log_probabilities
from flashmorph.mixers import FullAttention, GatedDeltaNet
from flashmorph.mixers.convolution import convolve
from flashmorph.mixers.kernels import in_one_row
from flashmorph.model.morphable import Morphable, attach
from flashmorph.plan import Budget
from flashmorph.recipe.recipe import load_recipe
from flashmorph.stages import AlignSettings, collate
from flashmorph.stages.align import AlignmentLoss
from flashmorph.stages.distill import DistillationLoss, StoredDistillationLoss
from flashmorph.stages.extend import NextTokenLoss

LENGTH, WINDOW = 90, 8
STARTS = ((0, 7, 75, 76), (0, 30))
"""Documents of 7, 68, 1 and 14 tokens, and of 30 and 60."""
MIXERS = ["qwen3: grouped", "qwen3_moe: grouped", "granite: grouped"]
WINDOWS = [f"{list(host.teachers)[-1]}, window" for host in WINDOW_HOSTS]
CASES = [*MIXERS, *WINDOWS]
"""Every host with its linear mixer (granite divides its logits), and every class with windows."""
MARKED = [case for case in CASES if not case.startswith("granite")]
"""Those that take boundaries on CUDA; Granite's class makes its attention mask without positions."""


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


@functools.cache
def host_in(case: str) -> tuple[torch.nn.Module, Host]:
    """The case's teacher in its host, every layer full."""
    family, _, window = case.partition(", ")
    teacher = random_teacher(family if ":" in family else f"{family}: grouped")
    settings = {"window": WINDOW} if window else {}
    model, _ = transplant(teacher, settings)
    if hasattr(model.config, "mamba_chunk_size"):
        model.config.mamba_chunk_size = 16
    return model.requires_grad_(False), configure(teacher.config, settings)[0]


@functools.cache
def morphable_model(case: str = MIXERS[0]) -> Morphable:
    """Branches start with convolutions of the current token alone: these look back, so that they could leak."""
    host = copy.deepcopy(host_in(case)[0])
    morphable, _ = attach(host, torch.randint(97, (4, 48), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for name, weight in morphable.branch_state().items():
            if name.endswith("conv1d.weight"):
                weight.normal_(generator=torch.Generator().manual_seed(1))
    return morphable


@functools.cache
def hybrid(case: str, full: str):
    morphable = morphable_model(case)
    budget = Budget("layers", 1)
    return morphable.instantiate(morphable.space(budget).plan([full], budget)).requires_grad_(False)


def in_place(places: list[Packed], values: list[torch.Tensor]) -> torch.Tensor:
    """`values` of each batch's tokens, `[tokens, width]`, where the tokens stood: `[rows, LENGTH, width]`."""
    found = values[0].new_full((2 * LENGTH, values[0].shape[-1]), torch.nan)
    for place, value in zip(places, values, strict=True):
        found[place.tokens(place.input_ids)] = value
    return found.view(2, LENGTH, -1)


def run_apart(decoder, host: Host, ids: torch.Tensor, starts: torch.Tensor | None, way=None) -> torch.Tensor:
    """Last hidden states `[rows, time, width]`, each where its token stood."""

    def batches(values: torch.Tensor) -> list[Packed]:
        return way(values, starts) if way else apart(values, starts, supports_varlen(host, values.device))

    found = batches(ids)
    return in_place(
        batches(torch.arange(ids.numel(), device=ids.device).view_as(ids)), [each.run(decoder) for each in found]
    )


def branch_outputs(case: str, ids: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """What alignment compares: every layer's attention and its other branch, `[rows, time, values]`."""
    morphable = morphable_model(case)
    varlen = supports_varlen(morphable.host, ids.device)
    batches = apart(ids, starts, varlen)
    places = apart(torch.arange(ids.numel()).view_as(ids), starts, varlen)
    found = []
    for each in batches:
        outputs: list[torch.Tensor] = []

        def keep(layer, hidden, arguments, output, outputs=outputs):
            outputs.extend([output, *(branch(hidden, arguments) for branch in layer.others.values())])

        morphable(each.input_ids, boundaries=each.boundaries, observer=keep)
        found.append(torch.cat([each.tokens(output) for output in outputs], 1))
    return in_place(places, found)


def planted(at: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and the same with one token of the second document changed."""
    ids, _ = packed_rows()
    changed = ids.clone()
    changed[0, at] = (ids[0, at] + 1) % 97
    return ids, changed


def hybrid_outputs(case: str, ids: torch.Tensor, starts: torch.Tensor | None, full: str) -> torch.Tensor:
    return run_apart(hybrid(case, full).model, morphable_model(case).host, ids, starts)


def teacher_outputs(case: str, ids: torch.Tensor, starts: torch.Tensor | None, way=None) -> torch.Tensor:
    model, host = host_in(case)
    return run_apart(model.model, host, ids, starts, way)


RUNS = {
    "align": branch_outputs,
    "distill and extend, full above": lambda *rows: hybrid_outputs(*rows, "layers.1"),
    "distill and extend, full below": lambda *rows: hybrid_outputs(*rows, "layers.0"),
    "the teacher": teacher_outputs,
}


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Tokens whose values differ by more than rounding, `[rows, time]`.

    Experts get the tokens of all documents at once, so that another token may make them round otherwise.
    """
    return (before - after).abs().amax(-1) > 1e-5 * before.abs().amax()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_a_planted_token_moves_nothing_outside_its_document(name, case):
    _, starts = packed_rows()
    before, after = (RUNS[name](case, ids, starts) for ids in planted())
    assert not torch.isnan(before).any()
    found = moved(before, after)
    assert found[0, 12 : 12 + WINDOW].all()
    assert not found[0, :12].any() and not found[0, 75:].any() and not found[1].any()
    joined = moved(*(RUNS[name](case, ids, None) for ids in planted(at=70)))
    assert joined[0, 75:].any(), "without boundaries nothing would leak either: this shows nothing"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("full", ["layers.0", "layers.1"])
@torch.no_grad()
def test_a_document_in_a_row_is_computed_as_if_it_were_alone(full, case):
    model = hybrid(case, full)
    ids, starts = packed_rows()
    alone = [model.model(input_ids=document, use_cache=False).last_hidden_state[0] for document in documents(ids)]
    found = hybrid_outputs(case, ids, starts, full).flatten(0, 1)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_documents(case):
    ids, starts = packed_rows()
    student, (teacher, _) = hybrid(case, "layers.1"), host_in(case)
    heads = Head.of(student), Head.of(teacher)
    apart_ids = documents(ids)
    divergences, losses = [], []
    for document in apart_ids:
        hidden, target = (
            model.model(input_ids=document, use_cache=False).last_hidden_state for model in (student, teacher)
        )
        divergences.append(len(document[0]) * forward_kl(hidden, heads[0], target, heads[1]))
        if len(document[0]) > 1:
            losses.append((len(document[0]) - 1) * label_loss(hidden[0, :-1], heads[0], document[0, 1:]))
    labels = ids.numel() - len(apart_ids)
    found = DistillationLoss(student, teacher)(ids, starts)["loss"]
    torch.testing.assert_close(found, sum(divergences) / ids.numel(), rtol=1e-4, atol=1e-5)
    found = NextTokenLoss(student)(ids, starts)["loss"]
    torch.testing.assert_close(found, sum(losses) / labels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MIXERS)
@torch.no_grad()
def test_alignment_sums_over_documents_before_it_divides(case):
    ids, starts = packed_rows()
    outputs = branch_outputs(case, ids, starts).double().unflatten(-1, (2, 2, -1)).flatten(0, 1)
    attention, branch = outputs[:, :, 0], outputs[:, :, 1]
    expected = (branch - attention).square().sum((0, 2)) / attention.square().sum((0, 2))
    found = AlignmentLoss(morphable_model(case))(ids, starts)["errors"].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_do_not_cross_a_boundary():
    model = hybrid(MIXERS[0], "layers.1")
    ids, starts = packed_rows()
    embedded = model.model.embed_tokens(ids).detach().requires_grad_(True)
    embedded_part = [None]
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: embedded_part[0])
    total = 0
    places = cut(torch.arange(ids.numel(), device=ids.device).view_as(ids), starts)
    for each, place in zip(cut(ids, starts), places, strict=True):
        embedded_part[0] = embedded.flatten(0, 1)[place.input_ids]
        inside = (place.tokens(place.input_ids) >= 7) & (place.tokens(place.input_ids) < 75)
        total = total + each.run(model.model)[inside].square().sum()
    hook.remove()
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
    (only,) = apart(ids, None, True)
    assert only.input_ids is ids and not only.boundaries
    places, following = only.next_tokens()
    assert torch.equal(following, ids[:, 1:].flatten()) and len(places) == ids.numel() - 2
    batch = collate([{"input_ids": row.tolist(), "starts": [0], "ignored": []} for row in ids])
    assert set(batch) == {"input_ids"}


@pytest.mark.parametrize("case", MIXERS)
def test_boundaries_are_never_dropped_in_silence(case):
    """A CPU cuts rows; the form for kernels is refused there, by a hybrid and by a branch."""
    ids, starts = packed_rows()
    with pytest.raises(ValueError, match="packed sequences"):
        marked(ids, starts).run(hybrid(case, "layers.1").model)
    with pytest.raises(ValueError, match="packed sequences"):
        morphable_model(case)(ids, torch.full((2, 2), 0.5), marked(ids, starts).boundaries)


@pytest.mark.parametrize("host", [*HOSTS, *WINDOW_HOSTS], ids=lambda host: host.name)
def test_a_cpu_cuts_rows(host):
    varlen = supports_varlen(host, torch.device("cpu"))
    assert how_apart(True, varlen) == "apart, rows cut at the boundaries"
    assert how_apart(False, varlen) == "joined"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hosts_take_boundaries_only_where_full_layers_do(case, monkeypatch):
    """With every kernel installed. Where the second part fails, the class has learned it, and the host may as well."""
    ids, starts = packed_rows()
    found = teacher_outputs(case, ids, starts, way=lambda *rows: [marked(*rows)])
    same = torch.allclose(found, teacher_outputs(case, ids, starts), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(kernels, "implementation_in_use", lambda *names: "fla.ops")
    assert supports_varlen(host_in(case)[1], torch.device("cuda")) == same == (case in MARKED)


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
        for host in HOSTS:
            use_kernels(host.model_type)
        for module in (modelling, moe_modelling):
            rule, convolution = module.torch_chunk_gated_delta_rule, module.causal_conv1d_fn

            def delta_rule(*args, rule=rule, **kwargs):
                packed = kwargs["cu_seqlens"] is not None
                return in_one_row(delta_rule_kernel, *args, **kwargs) if packed else rule(*args, **kwargs)

            def convolve_or_not(*args, convolution=convolution, **kwargs):
                return convolve(*args, **kwargs) if "seq_idx" in kwargs else convolution(*args, **kwargs)

            delta_rule.decorated = rule.decorated  # type: ignore[attr-defined]
            monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", delta_rule)
            monkeypatch.setattr(module, "causal_conv1d_fn", convolve_or_not)
        for mixer in (FullAttention, GatedDeltaNet):
            monkeypatch.setattr(mixer, "supports_varlen", lambda self, device: True)

    return switch


@pytest.mark.parametrize("case", MARKED)
@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_boundaries_reach_every_kind_of_layer(name, case, as_on_a_gpu):
    ids, starts = packed_rows()
    expected = RUNS[name](case, ids, starts)
    as_on_a_gpu()
    torch.testing.assert_close(RUNS[name](case, ids, starts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("time", [2, 40])
def test_the_convolution_of_packed_rows_is_that_of_each_document(time, bias):
    hidden, weight = torch.randn(2, 6, time), torch.randn(6, 4)
    added = torch.randn(6) if bias else None
    seq_idx = torch.stack([(torch.arange(time) >= 1).int(), (torch.arange(time) >= 17).int() + 3])
    found = convolve(hidden, weight, added, "silu", seq_idx=seq_idx)
    for row in range(2):
        for number in seq_idx[row].unique():
            alone = hidden[row : row + 1, :, seq_idx[row] == number]
            expected = modelling.causal_conv1d_fn(alone, weight, added, activation="silu")
            torch.testing.assert_close(found[row : row + 1, :, seq_idx[row] == number], expected)


def test_demo_trains_on_rows_as_when_it_was_measured_and_default_on_short_documents_apart():
    demo, default = load_recipe("demo"), load_recipe("default")
    assert not any(stage.keeps_apart for stage in (demo.align, demo.distill, demo.extend))
    assert all(stage.keeps_apart for stage in (default.align, default.distill, AlignSettings()))
    assert default.extend.documents == "joined" and not default.extend.keeps_apart


def test_collated_rows_tell_which_tokens_are_learnt():
    row = {"input_ids": [5, 6, 7, 8], "starts": [0, 2], "ignored": []}
    assert set(collate([row, row])) == {"input_ids", "starts"}
    found = collate([row, {**row, "starts": [0], "ignored": [1, 3]}], isolate=False)
    assert found["loss_mask"].tolist() == [[True] * 4, [True, False, True, False]] and "starts" not in found


@pytest.mark.parametrize("way", ["joined", "cut"])
def test_only_tokens_that_are_learnt_count(way):
    """The losses are those of single documents, over what predicts the tokens of the mask."""
    host, _ = host_in(MIXERS[0])
    ids, starts = packed_rows()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    given = None if way == "joined" else starts
    texts, masks = (list(each[:, None]) if way == "joined" else documents(each) for each in (ids, mask))
    teacher = copy.deepcopy(host)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    divergences, losses, kept = [], [], []
    for text, learnt in zip(texts, masks, strict=True):
        found, target = (F.log_softmax(model(input_ids=text).logits.float(), -1)[0] for model in (host, teacher))
        counts = torch.cat([learnt[0, 1:], learnt[0, -1:]])
        divergences += F.kl_div(found, target, log_target=True, reduction="none").sum(-1)[counts].tolist()
        kept.append(top_log_probabilities(teacher(input_ids=text).logits[0], found.shape[-1]))
        losses += F.nll_loss(found[:-1], text[0, 1:], reduction="none")[learnt[0, 1:]].tolist()
    found = DistillationLoss(host, teacher)(ids, given, mask)["loss"].item()
    assert found == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    values, places = (torch.cat(each).unflatten(0, ids.shape) for each in zip(*kept, strict=True))
    stored = StoredDistillationLoss(host)(ids, values, places, given, mask)["loss"].item()
    assert stored == pytest.approx(found, rel=1e-3)
    assert NextTokenLoss(host)(ids, given, mask)["loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    for loss in (DistillationLoss(host, teacher), NextTokenLoss(host)):
        every, without = (loss(ids, given, each)["loss"].item() for each in (torch.ones_like(mask), None))
        assert every == pytest.approx(without, rel=1e-6)
        assert loss(ids, given, torch.zeros_like(mask))["loss"].item() == 0
    one, other = (AlignmentLoss(morphable_model())(ids, given, each)["loss"].item() for each in (mask, None))
    assert one == other


def test_rows_that_are_marked_learn_the_tokens_of_rows_that_are_cut():
    ids, starts = packed_rows()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = []
    for batches in ([marked(ids, starts, mask)], cut(ids, starts, mask)):
        labels = torch.cat([each.next_tokens()[1] for each in batches])
        predicting = torch.cat([each.predicting(each.tokens(each.input_ids)[:, None]) for each in batches])
        found.append((labels.sort().values, predicting[:, 0].sort().values))
    assert all(map(torch.equal, *found)) and 0 < len(found[0][0]) <= len(found[0][1]) < ids.numel()
