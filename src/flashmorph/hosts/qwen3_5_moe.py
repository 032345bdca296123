"""Qwen3's mixtures of experts in Qwen3.5's: as `qwen3_5.py`, plus a shared expert with a zero down projection.

Qwen3.5 adds the output of an expert that all tokens share; at the start it contributes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from flashmorph.errors import UserError
from flashmorph.hosts.host import layer_prefixes
from flashmorph.hosts.qwen3_5 import Qwen35Host
from flashmorph.mixers import LINEAR, GatedDeltaNet, Mixer, Products

_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "router_aux_loss_coef")
_SHARED_WIDTH = 128


class Qwen35MoeHost(Qwen35Host):
    """Qwen3-MoE in `Qwen3_5MoeForCausalLM` (`qwen3_5_moe_text`)."""

    teachers: Mapping[str, str] = {"qwen3_moe": "Qwen3-MoE, where the router normalises (norm_topk_prob)"}
    model_class: type[PreTrainedModel] = Qwen3_5MoeForCausalLM
    config_class: Callable[..., PreTrainedConfig] = Qwen3_5MoeTextConfig
    mixers: Mapping[str, Mixer] = {**Qwen35Host.mixers, LINEAR: GatedDeltaNet(Qwen3_5MoeGatedDeltaNet)}
    mlp_readers: tuple[str, ...] = (
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj",
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
    )

    def check(self, teacher: PreTrainedConfig) -> None:
        """Refuse also routers that do not normalise what they choose, and layers without experts."""
        super().check(teacher)
        if not teacher.norm_topk_prob:
            raise UserError(
                f"the teacher's router leaves the chosen experts' weights as they are (norm_topk_prob is false); "
                f"{self.name} divides them by their sum, so the move would not be exact"
            )
        if teacher.mlp_only_layers or teacher.decoder_sparse_step != 1:
            raise UserError(
                f"the teacher has layers without experts (mlp_only_layers, decoder_sparse_step); {self.name} has "
                "experts in every layer"
            )

    def mlp_shape(self, teacher: PreTrainedConfig) -> dict[str, Any]:
        """The experts' fields; the shared expert is narrow."""
        same = {name: getattr(teacher, name) for name in _EXPERTS}
        return {**same, "shared_expert_intermediate_size": _shared_width(teacher)}

    def teacher_state(self, teacher: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With a silent shared expert: rows of the first expert, so that it can learn, and nothing that reads them."""
        state, width = super().teacher_state(teacher, state), _shared_width(teacher)
        for layer in layer_prefixes(state):
            prefix = f"{layer}mlp."
            gate, up = state[f"{prefix}experts.gate_up_proj"][0].chunk(2)
            state[f"{prefix}shared_expert.gate_proj.weight"] = gate[:width]
            state[f"{prefix}shared_expert.up_proj.weight"] = up[:width]
            state[f"{prefix}shared_expert.down_proj.weight"] = gate.new_zeros(gate.shape[1], width)
            state[f"{prefix}shared_expert_gate.weight"] = gate.new_zeros(1, gate.shape[1])
        return state

    def feed_forward(self, config: PreTrainedConfig) -> list[Products]:
        """The experts that the router chooses, and the shared one."""
        width, chosen, inner = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
        shared = config.shared_expert_intermediate_size
        formula = "6 · hidden · moe_intermediate · experts_per_token"
        return [
            Products("router", "input", "2 · hidden · experts", 2 * width * config.num_experts),
            Products("experts", "weights", formula, 6 * width * inner * chosen),
            Products("shared expert", "weights", "6 · hidden · shared_intermediate", 6 * width * shared),
            Products("its gate", "input", "2 · hidden", 2 * width),
        ]


def _shared_width(config: PreTrainedConfig) -> int:
    return min(_SHARED_WIDTH, config.moe_intermediate_size)
