"""Move a checkpoint on disk into its host layer by layer: it never has to fit into memory.

Each decoder layer is read, moved, run beside the teacher's, written and forgotten before the next one is read. The
probe batch of `in_memory.py` goes along, in every form of the two models that is compared: so at the end stand the same
logits, and the same proof, as after a move of whole models, and before it one proof for each layer.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from flashmorph.convert.in_memory import Proof, in_float64, probe, require_finite
from flashmorph.convert.load import load_config, require_one_head, unreadable
from flashmorph.convert.shards import ShardReader, ShardWriter
from flashmorph.convert.stored import require_layers, take_stock
from flashmorph.hosts import Host, configure, use_kernels
from flashmorph.hosts.build import without_weights
from flashmorph.losses import Head
from flashmorph.progress import Report, silent

_EMBEDDING = "model.embed_tokens."
_HEAD = "lm_head."


@dataclass(frozen=True)
class Moved:
    """How a move went: the proof on logits, one for each part, and what rounding to the checkpoint's dtype costs.

    `rounding` is how much further than the teacher's own rounded form the host's is from the float32 teacher, as a KL
    on the probe batch; None where nothing is rounded. Which weights round up is chance: single models scatter around 1.
    `notices` are about what is stored and was left out.
    """

    proof: Proof
    parts: dict[str, Proof]
    rounding: float | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """What is in memory at once: the embedding, a decoder layer, or the last norm with the head.

    `stored` are the names of its weights on disk, `prefixes` what their names in the model begin with.
    """

    name: str
    stored: Sequence[str]
    prefixes: tuple[str, ...]
    layer: int | None = None

    def of(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of this part among those of a whole model."""
        return {name: weight for name, weight in state.items() if name.startswith(self.prefixes)}

    def run(self, model: PreTrainedModel, given: torch.Tensor) -> torch.Tensor:
        """What this part of `model` makes of token ids, of hidden states, or at the end of the last ones."""
        decoder: Any = model.model
        if _HEAD in self.prefixes:
            return Head.of(model)(decoder.norm(given))
        if self.layer is None:
            with _alone(decoder, []):
                return decoder(input_ids=given, use_cache=False).last_hidden_state
        layer = decoder.layers[self.layer]
        # The model prepares the layer's other arguments; what it would do to an embedding was done before.
        hook = layer.register_forward_pre_hook(lambda module, inputs: (given, *inputs[1:]))
        try:
            with _alone(decoder, [layer]):
                return decoder(inputs_embeds=given, use_cache=False).last_hidden_state
        finally:
            hook.remove()


@torch.no_grad()
def transplant_checkpoint(
    source: Path,
    target: Path,
    settings: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    report: Report = silent,
    allow_unused: bool = False,
) -> tuple[PreTrainedConfig, Moved]:
    """Write the teacher in `source`, moved into its host's class, into the folder `target`: weights and configuration.

    In the dtype of the checkpoint, in files as large as the teacher's; what the host computes is proven in float32.
    In memory at once, at most: one file of the result; and of one layer the weights in float32 of teacher and host, or
    the teacher's in float64. `settings` are the host's own (`{"mamba_expand": 1}`); `allow_unused` as in `take_stock`.

    Raises:
        UserError: no exact host, a checkpoint that is damaged or incomplete or holds what is not computed, or a part
            that differs by more than the tolerance.
    """
    config = load_config(source)
    host, own = configure(config, settings)
    use_kernels(host.model_type)
    reader, device = ShardReader(source), device or torch.device("cpu")
    writer = ShardWriter(target, reader.largest_bytes if len(reader.files) > 1 else None)
    require_layers(config, reader.dtypes, source)
    teacher, model = without_weights(config), without_weights(own, host.model_class)
    stock = take_stock(teacher, reader.dtypes, source, allow_unused)
    for each in (teacher, model):
        _buffers_to(each, device)
    dtype = cast(torch.dtype, config.dtype or torch.float32)
    rounded = dtype if dtype in (torch.bfloat16, torch.float16) else None
    trip = _Trip(host, teacher, model, rounded, probe(config).to(device))
    parts = _parts(config, stock.taken)
    for number, part in enumerate(parts):
        report(number, len(parts))
        _read(teacher, part, reader, source, device)
        _fill(model, part, host.state(config, part.of(teacher.state_dict())))
        writer.add(_stored(model, part), dtype)
        trip.pass_through(part)
    moved = trip.arrive()
    writer.finish()
    model.config.dtype, model.config.architectures = dtype, [host.name]
    model.config.save_pretrained(target)
    cast(Any, teacher.generation_config).save_pretrained(target)
    report(len(parts), len(parts))
    return model.config, replace(moved, notices=stock.notices)


class _Trip:
    """The probe batch on its way through the parts, in each form of teacher and host that is compared."""

    def __init__(
        self,
        host: Host,
        teacher: PreTrainedModel,
        model: PreTrainedModel,
        rounded: torch.dtype | None,
        ids: torch.Tensor,
    ):
        self._host, self._teacher, self._model, self._rounded = host, teacher, model, rounded
        self._at = dict.fromkeys(("teacher", "host", "exact", "rounded teacher", "rounded host"), ids)
        self._proofs: dict[str, Proof] = {}

    def pass_through(self, part: _Part) -> None:
        """Run one part, which is in memory in float32, in each form, and forget it.

        Raises:
            UserError: on the teacher's own hidden states the host's outputs differ by more than the tolerance.
        """
        at, given = self._at, self._at["teacher"]
        at["teacher"] = part.run(self._teacher, given)
        found = part.run(self._model, given)
        at["host"] = part.run(self._model, at["host"])
        if self._rounded:
            _round(self._model, self._rounded)
            at["rounded host"] = part.run(self._model, at["rounded host"])
        _forget(self._model)
        with in_float64(self._teacher):
            exact = part.run(self._teacher, given.double() if given.is_floating_point() else given)
            at["exact"] = part.run(self._teacher, at["exact"])
        if self._rounded:
            _round(self._teacher, self._rounded)
            at["rounded teacher"] = part.run(self._teacher, at["rounded teacher"])
        _forget(self._teacher)
        self._proofs[part.name] = Proof.of(at["teacher"], found, exact)
        self._proofs[part.name].require(self._host, f"the outputs of {part.name}")

    def arrive(self) -> Moved:
        """Compare the logits.

        Raises:
            UserError: they differ by more than the tolerance.
        """
        proof = Proof.of(*(self._at[form] for form in ("teacher", "host", "exact")))
        proof.require(self._host, "logits")
        if not self._rounded:
            return Moved(proof, self._proofs, None)
        exact, *rounded = (
            F.log_softmax(self._at[form].float(), -1).flatten(0, 1)
            for form in ("teacher", "rounded teacher", "rounded host")
        )
        own, hosts = (F.kl_div(each, exact, log_target=True, reduction="batchmean").item() for each in rounded)
        return Moved(proof, self._proofs, hosts / own)


def _parts(config: PreTrainedConfig, taken: Mapping[str, str]) -> list[_Part]:
    """The parts in the order in which they run; `taken` has the weight that each stored name goes into."""

    def part(name: str, *prefixes: str, also: str = "", layer: int | None = None) -> _Part:
        wanted = (*prefixes, also) if also else prefixes
        return _Part(name, [name for name, weight in taken.items() if weight.startswith(wanted)], prefixes, layer)

    return [
        part("the embedding", _EMBEDDING),
        *(part(f"layer {n}", f"model.layers.{n}.", layer=n) for n in range(config.num_hidden_layers)),
        part("the head", "model.norm.", _HEAD, also=_EMBEDDING if config.tie_word_embeddings else ""),
    ]


def _read(teacher: PreTrainedModel, part: _Part, reader: ShardReader, source: Path, device: torch.device) -> None:
    """Fill one part of `teacher` in float32, as `from_pretrained` does: weights renamed, experts joined.

    Raises:
        UserError: a weight is damaged, of another shape or not finite; or a head that the configuration ties to the
            embedding is stored beside it and is another.
    """
    loading = LoadStateDictConfig(
        dtype=torch.float32,
        device_map={"": str(device)},
        weight_mapping=cast(Any, get_model_conversion_mapping(teacher)),
    )
    try:
        with reader.slices(part.stored) as slices:
            info, _ = convert_and_load_state_dict_in_model(teacher, slices, loading)
    except Exception as error:
        raise unreadable(source, error) from error
    if problems := [*info.error_msgs, *info.conversion_errors.values()]:
        raise unreadable(source, ValueError(problems[0].strip().splitlines()[-1]))  # Before it stands a traceback.
    for name, found, expected in info.mismatched_keys:
        raise unreadable(source, ValueError(f"{name} has shape {list(found)}, not {list(expected)}"))
    if teacher.config.tie_word_embeddings:
        require_one_head(teacher, source)
        teacher.tie_weights()
    require_finite(part.of(teacher.state_dict()).items())


def _fill(model: PreTrainedModel, part: _Part, state: dict[str, torch.Tensor]) -> None:
    """Set the weights of one part of the host.

    Raises:
        ValueError: `state` has not exactly the weights of this part.
        RuntimeError: a shape does not match.
    """
    if different := part.of(model.state_dict()).keys() ^ state.keys():
        raise ValueError(f"{type(model).__name__} and its weights differ in {sorted(different)}")
    model.load_state_dict(state, strict=False, assign=True)


def _stored(model: PreTrainedModel, part: _Part) -> dict[str, torch.Tensor]:
    """The weights of one part as `save_pretrained` stores them: experts apart, and no head that is the embedding."""
    state = part.of(model.state_dict())
    if model.config.tie_word_embeddings:
        state = {name: weight for name, weight in state.items() if not name.startswith(_HEAD)}
    return revert_weight_conversion(model, state)


@contextmanager
def _alone(decoder: Any, layers: list[nn.Module]):
    """A decoder that has these layers only, and no norm at its end."""
    every, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = nn.ModuleList(layers), nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = every, norm


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights alone, as loading in `dtype` does it: the rotary frequencies stay in float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _forget(model: PreTrainedModel) -> None:
    """Leave shapes of weights only, in float32."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty_like(weight, device="meta", dtype=torch.float32)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _buffers_to(model: PreTrainedModel, device: torch.device) -> None:
    """Move what is not trained, the rotary frequencies; weights are not there to be moved."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
