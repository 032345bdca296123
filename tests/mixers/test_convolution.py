"""Convolutions whose taps depend on the input: the identity at first, and what their definition says."""

import torch
from own_models import IDS, logits, random_hybrid

from flashmorph.own.convolution_flashmorph import DynamicConv

PLAIN = {"window": {"kind": "window", "size": 8}}
CONVOLVED = {"window": {"kind": "window", "size": 8, "conv": {"taps": 4, "rank": 5}}}


def test_it_starts_as_the_identity():
    plain, convolved = random_hybrid(PLAIN), random_hybrid(CONVOLVED)
    for module in convolved.modules():
        if isinstance(module, DynamicConv):
            module.reset()
    state = {name: weight for name, weight in convolved.state_dict().items() if ".conv." not in name}
    plain.load_state_dict(state)
    assert torch.equal(logits(plain, IDS), logits(convolved, IDS))


def test_a_gradient_enters_at_the_start():
    conv = DynamicConv(2, 3, 4, 16, taps=3, rank=2)
    conv.reset()
    q, k, v = (torch.randn(2, heads, 9, 4) for heads in (6, 2, 2))
    outputs = conv(q, k, v, torch.randn(2, 9, 16), None, None)
    sum((each * torch.randn_like(each)).sum() for each in outputs).backward()
    assert (conv.out.grad != 0).any() and (conv.static.grad != 0).all()


@torch.no_grad()
def test_it_is_its_definition():
    torch.manual_seed(0)
    conv = DynamicConv(2, 3, 4, 16, taps=3, rank=2)
    for weight in conv.parameters():
        torch.nn.init.normal_(weight)
    q, k, v = (torch.randn(1, heads, 9, 4) for heads in (6, 2, 2))
    hidden = torch.randn(1, 9, 16)
    found = torch.cat([each.flatten(1, 1) for each in conv(q, k, v, hidden, None, None)], 1)
    for head in range(2):
        channels = torch.cat([q[0, 3 * head : 3 * head + 3], k[0, head : head + 1], v[0, head : head + 1]])
        places = [3 * head, 3 * head + 1, 3 * head + 2, 6 + head, 8 + head]
        for part, place in enumerate(places):
            for dim in range(4):
                channel = (head * 5 + part) * 4 + dim
                for t in range(9):
                    z = conv.into[2 * head : 2 * head + 2] @ hidden[0, t]
                    taps = conv.out[channel].view(3, 2) @ z + conv.static[channel]
                    expected = channels[part, t, dim] + sum(
                        taps[w] * channels[part, t - w, dim] for w in range(3) if t >= w
                    )
                    assert torch.allclose(found[0, place, t, dim], expected, atol=1e-5)
