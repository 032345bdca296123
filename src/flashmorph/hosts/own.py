"""Llama- and Qwen3-shaped teachers in flashmorph's own type, whose layers are switched head by head.

Chosen only where a recipe asks for it: by a budget in heads, or by the setting `host.mixers` (`--mixers`). The classes
are in `flashmorph.own`; they travel with every checkpoint, and no engine beside transformers runs them.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel

from flashmorph.errors import UserError, nearest, quoted
from flashmorph.hosts.checks import BIASED, LLAMA_SETTINGS, ROPE_TYPES, refuse_rope, refuse_two_factors, refuse_windows
from flashmorph.hosts.host import Host, layer_prefixes, split_joint
from flashmorph.hosts.serving import TRANSFORMERS, Engine
from flashmorph.mixers import Mixer, Products
from flashmorph.mixers.own import OWN_MIXERS, OwnFull
from flashmorph.mixers.products import feed_forward_products, head_dim_of
from flashmorph.own import AUTO_MAP, TRAVELLING, FlashmorphConfig, FlashmorphForCausalLM
from flashmorph.plan import FULL

_NORMED = ("qwen3",)
"""Teachers whose queries and keys are normalised."""
_Size = Annotated[int, Field(ge=2, lt=1 << 31)]


class OwnHost(Host):
    """`FlashmorphForCausalLM`: each key-value head of each layer is full or has one of the mixers asked for."""

    teachers: Mapping[str, str] = {
        "llama": "Llama and what has its shape",
        "mistral": "Mistral without a window of its own",
        "ministral": "Ministral with every layer full",
        "qwen2": "Qwen2, Qwen2.5",
        "qwen3": "Qwen3 (dense)",
        "seed_oss": "Seed-OSS",
        "smollm3": "SmolLM3, also with layers without RoPE",
        "phi3": "Phi-3, Phi-4 without a window, rotating whole heads, with one list of rope factors at most",
    }
    settings: Mapping[str, str] = {
        "mixers": "what a head may be, with commas: full and at least one of " + ", ".join(OWN_MIXERS),
        "window": "tokens that heads with the mixers window, thin and pooled see exactly, the token itself included",
        "sinks": "first tokens of the text that a window sees as well",
        "segment": "tokens that a head with the mixer pooled sees as one key and value, outside of its window",
        "dash": "which published implementation heads with the mixer dash follow: package or benchmark",
        "chunk": "tokens that a head with the mixer dash reads or leaves out together; 0: as published",
        "density": "share of the chunks that heads with the mixer dash read on text; 0: what the published gamma gives",
        "conv": "taps of a convolution of queries, keys and values before RoPE, its taps made from the input; 0: none",
        "conv_rank": "numbers of a key-value head that these taps are made from; 0: taps fixed after training",
        "points": "size of each part of the sample that a head with the mixer thin keeps beside its window",
        "schedule": "what thin heads halve together: reduce (memory points · log n), or express (memory of 6 · points)",
        "halving": "which of two neighbours thin heads keep: the better one (greedy), or by the published thresholds",
        "decay": "how a linear head forgets: learned from the layer's input, fixed by head, or none",
        "head_norm": "whether linear and gated_delta_net heads have an RMSNorm before the output projection",
    }
    engines: tuple[Engine, ...] = (TRANSFORMERS,)
    model_class: type[PreTrainedModel] = FlashmorphForCausalLM
    by_head = True
    travelling = TRAVELLING

    def __init__(self, mixers: Sequence[str] = (FULL, *OWN_MIXERS), convolved: bool = False):
        self.mixers: Mapping[str, Mixer] = {
            name: OwnFull() if name == FULL else OWN_MIXERS[name](convolved) for name in mixers
        }

    @staticmethod
    def asked_for(given: Mapping[str, Any]) -> "OwnHost":
        """The host whose heads have one of the mixers in the setting `host.mixers`.

        Raises:
            UserError: names one that there is not, or says what is missing.
        """
        mixers = given["mixers"]
        names = [name.strip() for name in mixers.split(",")] if isinstance(mixers, str) else []
        wrong = [name for name in names if name not in (FULL, *OWN_MIXERS)]
        near = nearest(wrong[0], (FULL, *OWN_MIXERS)) if wrong else None
        if not names or wrong or len(set(names)) < len(names) or FULL not in names or len(names) < 2:
            raise UserError(
                f"host.mixers must be {FULL} and at least one of {', '.join(OWN_MIXERS)}, each once and with commas, "
                f"such as {FULL},{next(iter(OWN_MIXERS))}; got {quoted(mixers)}"
                + (f": did you mean {near}?" if near else "")
            )
        return OwnHost([name for name in (FULL, *OWN_MIXERS) if name in names], bool(given.get("conv")))

    @staticmethod
    def usual_mixers(given: Mapping[str, Any]) -> str:
        """The setting `host.mixers` of a budget in heads that comes without: windows where there is a window."""
        return f"{FULL},{'window' if 'window' in given else 'linear'}"

    @staticmethod
    def of(config: PreTrainedConfig) -> "OwnHost":
        """The host of a configuration that one has made."""
        settings = config.mixer_settings or {}
        # config.json sorts its keys, and of options that cost the same the first one counts.
        names = [name for name in (FULL, *OWN_MIXERS) if name == FULL or name in settings]
        return OwnHost(names, any("conv" in each for each in settings.values()))

    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse windows that are there already, and rotary embeddings that Qwen3's class computes otherwise."""
        refuse_windows(teacher, self.name)
        refuse_rope(teacher, self.name, ROPE_TYPES)
        refuse_two_factors(teacher, self.name)

    def config(
        self,
        teacher: PreTrainedConfig,
        mixers: str = "",
        window: _Size = 128,
        sinks: Annotated[int, Field(ge=0, lt=1 << 16)] = 4,
        points: Annotated[int, Field(ge=2, lt=1 << 16)] = 64,
        schedule: Literal["reduce", "express"] = "reduce",
        halving: Literal["greedy", "published"] = "greedy",
        segment: Annotated[int, Field(ge=2, lt=1 << 16)] = 16,
        dash: Literal["package", "benchmark"] = "package",
        chunk: Annotated[int, Field(ge=0, lt=1 << 16)] = 0,
        density: Annotated[float, Field(ge=0, le=1)] = 0.0,
        conv: Annotated[int, Field(ge=0, le=64)] = 0,
        conv_rank: Annotated[int, Field(ge=0, lt=1 << 12)] = 15,
        decay: Literal["learned", "fixed", "none"] = "learned",
        head_norm: bool = False,
    ) -> FlashmorphConfig:
        """Same shapes, every head full, and the settings of the mixers that heads may be switched to.

        Raises:
            UserError: a mixer would see the teacher's longest context as full attention does; a single tap or token; or
                points that the schedule express does not take.
        """
        for name, value in (("conv", conv), ("chunk", chunk)):
            if value == 1:
                raise UserError(f"host.{name}=1 is too small: it must be 2 or more, or 0")
        given = {"window": window, "sinks": sinks, "points": points, "decay": decay, "head_norm": head_norm}
        given |= {"schedule": schedule, "halving": halving}
        given |= {"segment": segment, "dash": dash, "chunk": chunk, "density": density}
        if "thin" in self.mixers and schedule == "express" and points & (points - 1):
            raise UserError(
                f"host.points={points} with host.schedule=express: it must be a power of two, such as "
                f"{1 << points.bit_length() - 1}"
            )
        longest = teacher.max_position_embeddings
        for name in self.mixers:
            sizes = {size: given[size] for size in OWN_MIXERS[name].sizes} if name != FULL else {}
            if sum(sizes.values()) >= longest:
                together = " and ".join(f"host.{size}={value}" for size, value in sizes.items())
                raise UserError(
                    f"{together}: the mixer {name} would see the teacher's longest context, {longest:,} tokens, as "
                    f"full attention does; {'their sum' if len(sizes) > 1 else 'it'} must be below that"
                )
        before = {"conv": {"taps": conv, "rank": conv_rank}} if conv else {}
        same: dict[str, Any] = {name: getattr(teacher, name) for name in LLAMA_SETTINGS}
        bias = teacher.model_type in BIASED or bool(getattr(teacher, "attention_bias", False))
        out = getattr(teacher, "attention_out_bias", bias and teacher.model_type not in BIASED)
        rope_less = getattr(teacher, "no_rope_layers", None)
        return FlashmorphConfig(
            **same,
            head_dim=head_dim_of(teacher),
            attention_bias=bias,
            attention_out_bias=bool(out),
            mlp_bias=bool(getattr(teacher, "mlp_bias", False)),
            qk_norm=teacher.model_type in _NORMED,
            no_rope_layers=[int(bool(each)) for each in rope_less] if rope_less else None,
            rope_parameters=dict(teacher.rope_parameters),
            mixer_settings={
                name: {**OWN_MIXERS[name].own_settings(given), **before} for name in self.mixers if name != FULL
            },
            dtype=teacher.dtype,
        )

    def state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's weights under their own names; joint projections are split."""
        state = dict(state)
        key_rows = teacher.num_key_value_heads * head_dim_of(teacher)
        for layer in layer_prefixes(state):
            split_joint(state, f"{layer}self_attn.", key_rows)
            if (joint := f"{layer}mlp.gate_up_proj.weight") in state:
                gate, up = state.pop(joint).chunk(2)
                state |= {f"{layer}mlp.gate_proj.weight": gate, f"{layer}mlp.up_proj.weight": up}
        return state

    def with_plan(self, config: PreTrainedConfig, options: Sequence[str]) -> PreTrainedConfig:
        """A copy whose layers, or key-value heads layer by layer, have these options."""
        heads = config.num_key_value_heads
        by_head = [option for option in options for _ in range(heads * config.num_hidden_layers // len(options))]
        layers = [by_head[start : start + heads] for start in range(0, len(by_head), heads)]
        values = copy.deepcopy(config).to_dict()
        values["mixers"] = [
            {option: [head for head in range(heads) if layer[head] == option] for option in dict.fromkeys(layer)}
            for layer in layers
        ]
        made = FlashmorphConfig.from_dict(values)
        made.dtype = config.dtype
        return made

    def options(self, config: PreTrainedConfig) -> list[tuple[str, ...]]:
        """The option of each key-value head, layer by layer."""
        return [
            tuple(option for _, option in sorted((head, option) for option, heads in layer.items() for head in heads))
            for layer in config.mixers
        ]

    def layer_state(
        self, options: Sequence[str], states: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The attention's own weights, and of each mixer the rows of the heads that have it."""
        state = {f"self_attn.{name}": weight for name, weight in states[FULL].items()}
        for option in set(options) - {FULL}:
            heads = [head for head, each in enumerate(options) if each == option]
            for name, weight in states[option].items():
                rows = weight.unflatten(0, (len(options), -1))[heads].flatten(0, 1)
                state[f"self_attn.mixers.{option}.{name.removeprefix('mixer.')}"] = rows
        return state

    def serialise(self, values: dict[str, Any]) -> dict[str, Any]:
        """With the classes in the files that travel with the checkpoint."""
        return {**values, "auto_map": dict(AUTO_MAP)}

    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """A gated feed-forward."""
        return feed_forward_products(config.hidden_size, config.intermediate_size)


OWN = OwnHost()
