"""The names of a model's parts: every weight of every teacher and of its host is in one of them."""

import pytest
from families import ONE_OF_EACH_FAMILY, config_of
from torch import nn

from flashmorph.hosts import OWN, configure
from flashmorph.hosts.build import without_weights
from flashmorph.hosts.parts import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER,
    decoder_of,
    final_norm_of,
    input_norm_of,
    layer_prefix,
    layers_of,
    only_layers,
)
from flashmorph.losses import Head

BY_HEAD = {"mixers": "full,window"}
CASES = [
    *((family, {}) for family in ONE_OF_EACH_FAMILY),
    *((family, BY_HEAD) for family in ONE_OF_EACH_FAMILY if family.partition(":")[0] in OWN.teachers),
]


def models(family: str, settings: dict):
    config = config_of(family)
    host, own = configure(config, settings)
    return without_weights(config), without_weights(own, host.model_class)


@pytest.mark.parametrize("family, settings", CASES)
def test_every_weight_is_in_a_part(family, settings):
    for model in models(family, settings):
        layers = [layer_prefix(number) for number in range(len(layers_of(model)))]
        parts = (EMBEDDING, FINAL_NORM, HEAD, *layers)
        by_part = {part: [name for name in model.state_dict() if name.startswith(part)] for part in parts}
        assert all(by_part.values()) and sum(map(len, by_part.values())) == len(model.state_dict())
        for number, prefix in enumerate(layers):
            assert all(LAYER.match(name)[0] == prefix for name in by_part[prefix])
            assert {int(LAYER.match(name)[1]) for name in by_part[prefix]} == {number}
            assert input_norm_of(layers_of(model)[number]).weight.ndim == 1
        assert Head.of(model).projection is model.get_submodule(HEAD.rstrip("."))
        assert final_norm_of(model) is model.get_submodule(FINAL_NORM.rstrip("."))
        assert decoder_of(model) is model.get_submodule(EMBEDDING.split(".")[0])


def test_a_decoder_has_its_layers_and_norm_back():
    model, _ = models(ONE_OF_EACH_FAMILY[0], {})
    layers, norm = layers_of(model), final_norm_of(model)
    with pytest.raises(RuntimeError), only_layers(model, [layers[1]]):
        assert [*layers_of(model)] == [layers[1]] and isinstance(final_norm_of(model), nn.Identity)
        raise RuntimeError
    assert layers_of(model) is layers and final_norm_of(model) is norm


@pytest.mark.parametrize(
    "name, number",
    [
        ("model.layers.3.self_attn.q_proj.weight", "3"),
        ("model.layers.12", "12"),
        ("layers.0.weight", "0"),
        ("model.norm.weight", None),
        ("model.sublayers.3.weight", None),
        ("model.layers.x", None),
    ],
)
def test_a_layer_is_known_by_its_name(name, number):
    found = LAYER.match(name)
    assert (found and found[1]) == number
