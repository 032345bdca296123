"""Move a teacher into its host, all layers full, and prove that nothing changed.

Here for a teacher that is in memory; `streamed.py` moves one that is on disk.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from flashmorph.devices import with_float64
from flashmorph.errors import UserError
from flashmorph.hosts import Host, configure
from flashmorph.hosts.build import empty_model

PROBE_TOKENS = 64
PROBE_ROWS = 2
RELATIVE_TOLERANCE = 1e-5
NOISE_FACTOR = 2.0


@dataclass(frozen=True)
class Proof:
    """The difference of the host's logits, or of a layer's outputs, from the teacher's on a probe batch, in float32.

    `largest` is the teacher's largest magnitude there, `noise` its own largest float32-against-float64 difference,
    `tolerance` what was allowed.
    """

    difference: float
    largest: float
    noise: float
    tolerance: float

    @staticmethod
    def of(expected: torch.Tensor, found: torch.Tensor, exact: torch.Tensor) -> "Proof":
        """Compare what the host `found` with what its teacher gives, in float32 (`expected`) and float64 (`exact`)."""
        largest = expected.abs().max().item()
        noise = (expected - exact).abs().max().item()
        difference = (found - expected).abs().max().item()
        return Proof(difference, largest, noise, max(RELATIVE_TOLERANCE * largest, NOISE_FACTOR * noise))

    def require(self, host: Host, what: str) -> None:
        """Refuse a move that is not exact.

        Raises:
            UserError: `what` differs by more than the tolerance.
        """
        if not self.difference <= self.tolerance:
            raise UserError(
                f"the move into {host.name} is not exact: {what} differ by {self.difference:.1e}, "
                f"{self.tolerance:.1e} is allowed; please report this teacher's config.json"
            )

    def to_dict(self) -> dict[str, float]:
        """The JSON form."""
        return asdict(self)


@torch.no_grad()
def transplant(teacher: PreTrainedModel, settings: Mapping[str, Any] | None = None) -> tuple[PreTrainedModel, Proof]:
    """The teacher in its host's class with the same logits, in float32, and the proof.

    `teacher` must be in float32; it is left as it was. `settings` are the host's own (`{"mamba_expand": 1}`).

    Raises:
        UserError: no exact host, a weight that is not finite, or logits that differ by more than the tolerance.
    """
    host, config = configure(teacher.config, settings)
    for name, weight in teacher.named_parameters():
        if weight.dtype != torch.float32:
            raise UserError(f"the teacher must be loaded in float32 for an exact move; {name} is in {weight.dtype}")
    require_finite(teacher.named_parameters())
    state = host.state(teacher.config, teacher.state_dict())
    model = empty_model(host, config, {name: weight.clone() for name, weight in state.items()})
    model.generation_config = teacher.generation_config
    proof = prove(teacher, model)
    proof.require(host, "logits")
    return model, proof


def require_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: names the first of them.
    """
    for name, weight in weights:
        if not torch.isfinite(weight).all():
            raise UserError(f"the teacher's weight {name} has values that are not finite; its checkpoint is damaged")


def probe(config: PreTrainedConfig) -> torch.Tensor:
    """The probe batch: random tokens `[PROBE_ROWS, PROBE_TOKENS]`, the same for every teacher of a vocabulary; fewer
    where its contexts are shorter, beyond which a window may lie."""
    generator, tokens = torch.Generator().manual_seed(0), min(PROBE_TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (PROBE_ROWS, tokens), generator=generator)


@torch.no_grad()
def prove(teacher: PreTrainedModel, model: PreTrainedModel) -> Proof:
    """Compare logits on random tokens; the tolerance follows the teacher's own rounding noise."""
    ids, training = probe(teacher.config).to(teacher.device), teacher.training
    teacher = teacher.eval()
    expected = teacher(input_ids=ids, use_cache=False).logits
    of_host = model(input_ids=ids, use_cache=False).logits
    with in_float64(teacher):
        exact = teacher(input_ids=ids.to(teacher.device), use_cache=False).logits
    teacher.train(training)
    if exact.device != expected.device:
        expected, of_host = expected.cpu(), of_host.cpu()
    return Proof.of(expected, of_host, exact)


@contextmanager
def in_float64(teacher: PreTrainedModel) -> Iterator[None]:
    """The model's weights in float64, on a device that has it, and afterwards as they were, in float32."""
    device, exact = teacher.device, with_float64(teacher.device)
    experts = teacher.get_experts_implementation()
    teacher.set_experts_implementation("eager")  # The grouped products of the others know no float64.
    if exact != device:  # Of one that is read part by part the rest is on the device `meta`, and stays there.
        teacher.to(exact)  # type: ignore[arg-type]
    teacher.double()
    try:
        yield
    finally:
        teacher.float().set_experts_implementation(experts)
        if exact != device:
            teacher.to(device)  # type: ignore[arg-type]
