"""Random hybrids of our own type, with every mixer."""

import random

import torch
from torch import nn

from flashmorph.own import FlashmorphConfig, FlashmorphForCausalLM
from flashmorph.plan import FULL

IDS = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(3))
KINDS = {
    "windows with sinks": {"window": {"kind": "window", "size": 8, "sinks": 3}},
    "a window longer than a block of queries": {"window": {"kind": "window", "size": 300, "sinks": 1}},
    "learned decay": {"linear": {"kind": "linear"}},
    "fixed decay, normalised": {"linear": {"kind": "linear", "decay": "fixed", "norm": True}},
    "a thinned sample": {"thin": {"kind": "thin", "points": 4, "window": 6, "sinks": 2}},
    "thinned at random": {"thin": {"kind": "thin", "points": 2, "window": 3, "halving": "published"}},
    "a bounded sample": {"thin": {"kind": "thin", "points": 2, "window": 3, "sinks": 1, "schedule": "express"}},
    "a bounded sample, at random": {
        "thin": {"kind": "thin", "points": 4, "window": 2, "schedule": "express", "halving": "published"}
    },
    "pooled": {"pooled": {"kind": "pooled", "segment": 4, "window": 7, "sinks": 2}},
    "pooled, a window shorter than a segment": {"pooled": {"kind": "pooled", "segment": 6, "window": 2}},
    "chunks": {"dash": {"kind": "dash", "chunk": 4, "gamma": 2.0}},
    "chunks, two of them local": {"dash": {"kind": "dash", "chunk": 7, "gamma": 0.5, "local": 2, "sigma": 10.0}},
    "convolved": {
        "window": {"kind": "window", "size": 8, "sinks": 2, "conv": {"taps": 3, "rank": 2}},
        "linear": {"kind": "linear", "conv": {"taps": 4, "rank": 0}},
    },
    "the delta rule": {"gated_delta_net": {"kind": "gated_delta_net"}},
    "the delta rule, normalised": {"gated_delta_net": {"kind": "gated_delta_net", "norm": True}},
    "a state space": {"mamba2": {"kind": "mamba2"}},
    "no decay": {"linear": {"kind": "linear", "decay": "none"}},
    "both": {"window": {"kind": "window", "size": 5, "sinks": 0}, "linear": {"kind": "linear"}},
}


SHAPES = {
    "llama": {"qk_norm": False, "num_attention_heads": 4},
    "qwen3": {"qk_norm": True, "num_attention_heads": 4},
    "grouped queries": {"qk_norm": True, "num_attention_heads": 8},
}


def random_hybrid(settings: dict, seed: int = 0, everywhere: bool = False, **shape) -> FlashmorphForCausalLM:
    """Three layers of four key-value heads with random mixers, at least one of each kind, in float32."""
    drawn = random.Random(seed)
    names = [*settings, *([] if everywhere else [FULL])]
    chosen = [[drawn.choice(names) for _ in range(4)] for _ in range(3)]
    chosen[0] = [names[number % len(names)] for number in range(4)]
    config = FlashmorphConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        mixer_settings=settings,
        **(shape or SHAPES["grouped queries"]),
        mixers=[{name: [head for head in range(4) if layer[head] == name] for name in set(layer)} for layer in chosen],
    )
    torch.manual_seed(seed)
    model = FlashmorphForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if any(part in name for part in ("proj", "map", "embed", "summary", "conv", "strength", "step", "skip")):
            nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


def logits(model, ids, **arguments):
    return model(ids, use_cache=False, **arguments).logits


def smooth(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values `[1, 1, tokens, 8]` of one head; values are smooth in keys of 4 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, 4, generator=generator) / 2
    directions = torch.randn(4, 8, generator=generator)
    padded = torch.cat([keys, torch.zeros(tokens, 4)], 1)
    queries = torch.cat([torch.randn(tokens, 4, generator=generator), torch.zeros(tokens, 4)], 1)
    return queries[None, None], padded[None, None], torch.sin(keys @ directions)[None, None]
