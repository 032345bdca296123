"""What every mixer of our own type must do, in every shape of model."""

import pytest
import torch
from own_models import IDS, KINDS, SHAPES, logits, random_hybrid

from flashmorph.hosts import cache_bytes
from flashmorph.own import CACHE


@pytest.mark.parametrize(
    ("shape", "everywhere"), [("llama", True), ("qwen3", False), ("grouped queries", True), ("grouped queries", False)]
)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryMixer:
    def test_is_causal(self, kind, shape, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere, **SHAPES[shape])
        changed = IDS.clone()
        changed[:, 30:] = 5
        assert torch.equal(logits(model, changed)[:, :30], logits(model, IDS)[:, :30])

    def test_reads_in_parts_and_writes_as_it_reads_at_once(self, kind, shape, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere, **SHAPES[shape])
        cache, parts = None, []
        for start, stop in ((0, 25), (25, 40), *((step, step + 1) for step in range(40, 60))):
            output = model(IDS[:, start:stop], use_cache=True, **{CACHE: cache})
            cache, parts = output[CACHE], [*parts, output.logits]
        assert torch.allclose(torch.cat(parts, 1), logits(model, IDS), atol=2e-5)

    def test_reads_padded_rows_as_each_alone(self, kind, shape, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere, **SHAPES[shape])
        pads = 9
        ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), IDS[:1, :-pads]], 1)
        ids = torch.cat([ids, IDS[1:]])
        mask = torch.ones_like(ids)
        mask[0, :pads] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = logits(model, ids, attention_mask=mask, position_ids=positions)
        assert torch.allclose(output[0, pads:], logits(model, IDS)[0, :-pads], atol=2e-5)
        assert torch.allclose(output[1], logits(model, IDS)[1], atol=2e-5)

        written = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        row = IDS[:1, :-pads]
        for _ in range(12):
            row = torch.cat([row, logits(model, row)[:, -1:].argmax(-1)], 1)
        assert torch.equal(written[0, pads:], row[0])

    def test_beam_search_with_a_cache_is_that_without(self, kind, shape, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere, **SHAPES[shape])
        common = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        ids = IDS[:, :20]
        mask = torch.ones_like(ids)
        with_cache = model.generate(ids, attention_mask=mask, **common)
        assert torch.equal(with_cache, model.generate(ids, attention_mask=mask, use_cache=False, **common))

    def test_values_of_all_tokens_have_their_gradient(self, kind, shape, everywhere):
        """Also of those in a sample, a segment or a state: autograd has what a small change of the values changes.

        So small that a sample keeps the same tokens.
        """
        model = random_hybrid(KINDS[kind], everywhere=everywhere, **SHAPES[shape]).double()
        weight = model.model.layers[-1].self_attn.v_proj.weight.requires_grad_()
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(weight.shape, generator=generator).double()
        towards = torch.randn(2, 97, generator=generator).double()

        def at(step: float) -> torch.Tensor:
            with torch.no_grad():
                weight.add_(step * direction)
                value = (logits(model, IDS)[:, -1] * towards).sum()
                weight.sub_(step * direction)
            return value

        (logits(model, IDS)[:, -1] * towards).sum().backward()
        step = 1e-4
        slope = (at(step) - at(-step)) / (2 * step)
        assert (weight.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.01, abs=2e-3)

    def test_the_cache_has_the_computed_size(self, kind, shape, everywhere):
        model = random_hybrid(KINDS[kind], everywhere=everywhere, **SHAPES[shape])
        model.config.dtype = torch.float32
        cache = model(IDS[:1], use_cache=True).past_key_values
        held = 0
        for layer in cache.layers:
            tensors = [layer.keys, layer.values] if layer.is_initialized else []
            tensors += [tensor for state in getattr(layer, "states", {}).values() for tensor in state.values()]
            # A window also counts tokens, and marks those that are no padding: a byte each and no more.
            held += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        assert held == cache_bytes(model.config, IDS.shape[1])
