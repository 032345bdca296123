"""Move a teacher into its host, all layers full, and prove that nothing changed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from flashmorph.errors import UserError
from flashmorph.hosts import Host, configure

PROBE_TOKENS = 64
PROBE_ROWS = 2
RELATIVE_TOLERANCE = 1e-5
NOISE_FACTOR = 2.0


@dataclass(frozen=True)
class Proof:
    """How far the host's logits are from the teacher's on a probe batch, in float32.

    `noise` is the teacher's own largest float32-against-float64 difference there, `tolerance` what was allowed.
    """

    difference: float
    largest_logit: float
    noise: float
    tolerance: float

    def to_dict(self) -> dict[str, float]:
        """The JSON form."""
        return asdict(self)


def empty_model(host: Host, config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the host's class that holds exactly these tensors.

    Raises:
        RuntimeError: names or shapes do not match the configuration.
    """
    with init_empty_weights(include_buffers=False):
        model = host.model_class(config)
    if config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    nn.Module.to(model, next(iter(state.values())).device)
    return model.eval()


@torch.no_grad()
def transplant(teacher: PreTrainedModel, settings: Mapping[str, Any] | None = None) -> tuple[PreTrainedModel, Proof]:
    """The teacher in its host's class with the same logits, in float32, and the proof.

    `teacher` must be in float32; it is left as it was. `settings` are the host's own (`{"mamba_expand": 1}`).

    Raises:
        UserError: no exact host, a weight that is not finite, or logits that differ by more than the tolerance.
    """
    host, config = configure(teacher.config, settings)
    for name, weight in teacher.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"the teacher's weight {name} has values that are not finite; its checkpoint is damaged")
        if weight.dtype != torch.float32:
            raise UserError(f"the teacher must be loaded in float32 for an exact move; {name} is in {weight.dtype}")
    model = empty_model(host, config, {name: weight.clone() for name, weight in host.host_state(teacher).items()})
    model.generation_config = teacher.generation_config
    proof = prove(teacher, model)
    if not proof.difference <= proof.tolerance:
        raise UserError(
            f"the move into {host.name} is not exact: logits differ by {proof.difference:.1e}, "
            f"{proof.tolerance:.1e} is allowed; please report this teacher's config.json"
        )
    return model, proof


@torch.no_grad()
def round_both(teacher: PreTrainedModel, model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Cast teacher and host to `dtype`, in place, and say how much more that costs the host.

    Both are compared with the teacher before the cast, as a KL on the probe batch: 1 means that the host is as near to
    the float32 teacher as the teacher's own rounded form. Which weights round up is chance, so single models scatter
    around 1.
    """
    ids = probe(teacher)
    exact = _log_probabilities(teacher, ids)
    found = []
    for each in (teacher, model):
        # Parameters alone, as loading in `dtype` does it: the rotary frequencies stay in float32.
        for weight in each.parameters():
            weight.data = weight.data.to(dtype)
        found.append(F.kl_div(_log_probabilities(each, ids), exact, log_target=True, reduction="batchmean").item())
    return found[1] / found[0]


def _log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model.eval()(input_ids=ids, use_cache=False).logits.float(), -1).flatten(0, 1)


def probe(teacher: PreTrainedModel) -> torch.Tensor:
    """The probe batch: random tokens `[PROBE_ROWS, PROBE_TOKENS]`, the same for every teacher of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(teacher.config.vocab_size, (PROBE_ROWS, PROBE_TOKENS), generator=generator)
    return ids.to(teacher.device)


@torch.no_grad()
def prove(teacher: PreTrainedModel, model: PreTrainedModel) -> Proof:
    """Compare logits on random tokens; the tolerance follows the teacher's own rounding noise."""
    ids, training = probe(teacher), teacher.training
    teacher = teacher.eval()
    expected = teacher(input_ids=ids, use_cache=False).logits
    difference = (model(input_ids=ids, use_cache=False).logits - expected).abs().max().item()
    experts = teacher.get_experts_implementation()
    teacher.set_experts_implementation("eager")  # The grouped products of the others know no float64.
    exact = teacher.double()(input_ids=ids, use_cache=False).logits
    teacher.float().train(training).set_experts_implementation(experts)
    noise = (expected - exact).abs().max().item()
    largest = expected.abs().max().item()
    return Proof(difference, largest, noise, max(RELATIVE_TOLERANCE * largest, NOISE_FACTOR * noise))
