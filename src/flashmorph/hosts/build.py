"""Models made of a configuration alone: without memory, or around tensors that are there."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flashmorph.errors import UserError, first_line
from flashmorph.hosts import use_kernels
from flashmorph.hosts.host import Host

_PLAIN = ("eager", "sdpa")
"""Implementations of attention that need no package beside PyTorch."""


def without_weights(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None, with_buffers: bool = True
) -> PreTrainedModel:
    """The causal language model of a configuration in float32, of its own class or `model_class`, without values.

    Its buffers, the rotary frequencies, have theirs unless `with_buffers` is false. What computes its attention is
    transformers' own, whatever the configuration has: a name of a repository there would be fetched and run.

    Raises:
        UserError: no model can be made of the configuration.
    """
    own, dtype = copy.deepcopy(config), config.dtype
    own_code(own)
    maker: Any = model_class._from_config if model_class else AutoModelForCausalLM.from_config
    options: dict[str, Any] = {} if model_class else {"trust_remote_code": False}
    with init_empty_weights(include_buffers=not with_buffers):
        try:
            model = maker(own, dtype=torch.float32, **options)
        except Exception as error:
            raise UserError(f"config.json describes no model that can be made: {first_line(error)}") from error
    model.config.dtype = dtype  # The class writes the dtype that it is made in there.
    return model.eval()


def own_code(config: PreTrainedConfig) -> None:
    """Let transformers choose what computes attention and experts, unless it is one of its plain ways."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) not in _PLAIN:
            setattr(config, name, None)


def empty_model(host: Host, config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the host's class that holds exactly these tensors.

    Raises:
        UserError: no model can be made of the configuration.
        RuntimeError: names or shapes do not match it.
    """
    use_kernels(host.model_type)
    model = without_weights(config, host.model_class)
    if config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    nn.Module.to(model, next(iter(state.values())).device)
    return model.eval()
