"""Every mixer of every host: gated before its output projection, with a bias there, and added as a file of its own."""

import importlib
from collections.abc import Mapping

import pytest
import torch
from families import ONE_OF_EACH_FAMILY, random_teacher
from test_morphable import close, logits

from flashmorph.convert.in_memory import transplant
from flashmorph.errors import UserError
from flashmorph.hosts import HOSTS, WINDOW_HOSTS, Host
from flashmorph.mixers import FullAttention, Mixer, SlidingWindow, gated
from flashmorph.model.morphable import Morphable, attach
from flashmorph.plan import FULL, Budget

WINDOWS = [f"{name}, windows" for name in ("llama: grouped", "qwen2: grouped", "qwen3: grouped")]
EVERY = [*ONE_OF_EACH_FAMILY, *WINDOWS]
TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))


def morphable_of(case: str) -> Morphable:
    name = case.removesuffix(", windows")
    model, _ = transplant(random_teacher(name, 1, num_hidden_layers=3), {"window": 5} if name != case else None)
    return attach(model, TOKENS)[0]


def with_biases(morphable: Morphable) -> None:
    """Random biases wherever a layer's mixers have one."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in morphable.named_parameters():
        if name.endswith("proj.bias"):
            weight.data = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("case", EVERY)
def test_one_hot_gates_are_the_built_model_under_biases(case):
    morphable = morphable_of(case)
    with_biases(morphable)
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    for group in space.groups:
        plan = space.plan([group], budget)
        hybrid = morphable.instantiate(plan)
        gates = torch.tensor(space.one_hot(plan), dtype=torch.float32).requires_grad_()
        hidden = morphable(TOKENS, gates)
        divided = hybrid.lm_head(hidden) / getattr(hybrid.config, "logits_scaling", 1)
        assert close(divided, logits(hybrid, TOKENS))


def test_a_bias_behind_the_heads_is_gated_with_them():
    morphable = morphable_of("llama: bias, untied, llama3")
    layer = morphable.layers[1]
    projection = layer.branches[FULL].module.o_proj
    assert projection.bias is not None
    with_biases(morphable)
    inputs: dict = {}
    morphable(
        TOKENS, observer=lambda each, hidden, arguments, output: inputs.update({each: (hidden, arguments, output)})
    )
    hidden, arguments, whole = inputs[layer]
    for share in (0.0, 0.25, 1.0):
        assert close(layer.branches[FULL](hidden, arguments, torch.tensor([share])), share * whole)


@pytest.mark.parametrize("case", ["qwen3: grouped", "llama: bias, untied, llama3", "llama: grouped, windows"])
def test_gates_by_head_add_up_to_the_layer(case):
    """Heads are gated before the projection: gates that are one for one head each give, all together, the layer."""
    morphable = morphable_of(case)
    with_biases(morphable)
    heads = morphable.model.config.num_key_value_heads
    assert heads > 1
    seen: list = []
    morphable(TOKENS, observer=lambda *values: seen.append(values))
    layer, hidden, arguments, _ = seen[0]
    separable = [branch for branch in layer.branches.values() if branch.mixer.separable_by_head]
    assert separable
    for branch in separable:
        parts = [branch(hidden, arguments, gate) for gate in torch.eye(heads)]
        assert close(torch.stack(parts).sum(0), branch(hidden, arguments))
        assert not close(parts[0], parts[1])


def test_a_mixer_whose_norm_spans_its_heads_has_no_gates_by_head():
    morphable = morphable_of("llama: grouped")
    branch = morphable.layers[0].branches["linear"]
    hidden = torch.randn(1, 6, morphable.model.config.hidden_size)
    with pytest.raises(ValueError, match="Mamba2 cannot be gated by head"):
        gated(branch.mixer, branch.module, hidden, {}, torch.ones(2))


@pytest.mark.parametrize("host", [*HOSTS, *WINDOW_HOSTS], ids=lambda host: host.name)
def test_protocols_are_small(host):
    def members(protocol: type) -> set[str]:
        own = {*vars(protocol), *protocol.__annotations__}
        return {name for name in own if not name.startswith("_")}

    assert len(members(Host)) <= 18 and len(members(Mixer)) <= 13
    for mixer in host.mixers.values():
        assert all(hasattr(mixer, name) for name in members(Mixer))
    assert list(host.mixers)[0] == FULL


@pytest.mark.parametrize("part", ["check", "config", "state", "feed_forward"])
def test_a_host_cannot_leave_out_what_no_other_knows(part):
    """A missing `state` would give no weights, a missing `check` let every teacher through."""
    others = {name: lambda self, *given: None for name in Host.__abstractmethods__ - {part}}
    with pytest.raises(TypeError, match=part):
        type("Partial", (Host,), others)()


class Newest(SlidingWindow):
    """A mixer as CONTRIBUTING says: one class, that sees the newest tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "the newest tokens"


def test_a_new_mixer_is_one_class_and_one_line_of_a_host(monkeypatch):
    (host,) = [host for host in WINDOW_HOSTS if "qwen3" in host.teachers]
    mixers: Mapping[str, Mixer] = {FULL: FullAttention(), "sliding": SlidingWindow(), "newest": Newest()}
    monkeypatch.setattr(host, "mixers", mixers)
    morphable = morphable_of("qwen3: grouped, windows")
    assert morphable.options == (FULL, "sliding", "newest")
    gates = torch.full((3, 3), 1 / 3, requires_grad=True)
    morphable(TOKENS, gates).square().sum().backward()
    assert gates.grad is not None and (gates.grad != 0).all()
    torch.testing.assert_close(gates.grad[:, 1], gates.grad[:, 2], rtol=1e-4, atol=1e-4)


HOST = '''
"""Qwen3 in its own class once more: layers attend fully or through `reach` tokens."""

import copy
from typing import Annotated

from pydantic import Field
from transformers import Qwen3ForCausalLM

from flashmorph.hosts.host import Host
from flashmorph.hosts.serving import TRANSFORMERS
from flashmorph.mixers import FullAttention, SlidingWindow
from flashmorph.mixers.products import feed_forward_products


class Own(Host):
    teachers = {"qwen3": "Qwen3"}
    mixers = {"full": FullAttention(), "sliding": SlidingWindow()}
    settings = {"reach": "tokens that a switched layer sees"}
    engines = (TRANSFORMERS,)
    model_class = Qwen3ForCausalLM

    def check(self, teacher):
        pass

    def config(self, teacher, reach: Annotated[int, Field(ge=2)] = 5):
        config = copy.deepcopy(teacher)
        config.sliding_window, config.use_sliding_window = reach, True
        return self.with_plan(config, ["full"] * config.num_hidden_layers)

    def state(self, teacher, state):
        return dict(state)

    def feed_forward(self, config):
        return feed_forward_products(config.hidden_size, config.intermediate_size)
'''


def test_a_new_host_is_one_file_and_one_entry(monkeypatch, tmp_path):
    """As CONTRIBUTING.md says; the whole path of an exact move, branches and a built plan goes through it."""
    (tmp_path / "own_host.py").write_text(HOST)
    monkeypatch.syspath_prepend(str(tmp_path))
    host = importlib.import_module("own_host").Own()
    monkeypatch.setattr("flashmorph.hosts.HOSTS", (host, *HOSTS))
    teacher = random_teacher("qwen3: grouped", 1, num_hidden_layers=3)
    with pytest.raises(UserError, match="reach"):
        transplant(teacher, {"reach": 1})
    model, proof = transplant(teacher, {"reach": 4})
    assert proof.difference == 0 and model.config.sliding_window == 4
    morphable, _ = attach(model, TOKENS)
    assert morphable.host is host and morphable.options == (FULL, "sliding")
    budget = Budget("layers", 1)
    hybrid = morphable.instantiate(morphable.space(budget).plan(["layers.1"], budget))
    assert hybrid.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert not close(logits(hybrid, TOKENS), logits(teacher, TOKENS))
