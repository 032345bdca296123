"""Transplant a checkpoint on disk layer by layer: it never has to fit into memory.

Each decoder layer is read, converted, run beside the teacher's, written and freed before the next one is read. The
probe batch of `in_memory.py` passes through the layers in every compared form of the two models. So each layer has its
own proof, and the final logits and their proof are the same as in a transplant of whole models.
"""

from collections.abc import Mapping, Sequence
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
from flashmorph.convert.load import load_config, require_one_head
from flashmorph.convert.shards import ShardReader, ShardWriter, unreadable
from flashmorph.convert.stored import require_layers, take_stock
from flashmorph.devices import with_float64
from flashmorph.hosts import Host, configure, use_kernels
from flashmorph.hosts.build import without_weights
from flashmorph.hosts.parts import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    decoder_of,
    final_norm_of,
    layer_prefix,
    layers_of,
    only_layers,
)
from flashmorph.losses import Head
from flashmorph.progress import Report, silent


@dataclass(frozen=True)
class Moved:
    """The record of a transplant: the proof on logits, one for each part, and the effect of rounding.

    `rounding` is the KL between the float32 teacher and the host in the checkpoint's dtype, over that between the
    float32 teacher and the teacher in that dtype, on the probe batch; None without rounding. Which weights round up is
    chance: single models scatter around 1. `notices` are about stored weights that were left out.
    """

    proof: Proof
    parts: dict[str, Proof]
    rounding: float | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """The unit in memory: the embedding, a decoder layer, or the last norm with the head.

    `stored` are the names of its weights on disk, `prefixes` the prefixes of their names in the model.
    """

    name: str
    stored: Sequence[str]
    prefixes: tuple[str, ...]
    layer: int | None = None

    def of(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of this part among those of a whole model."""
        return {name: weight for name, weight in state.items() if name.startswith(self.prefixes)}

    def run(self, model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
        """The output of this part of `model`: hidden states `[batch, time, width]` of token ids or hidden states, or
        logits of the last hidden states."""
        decoder = decoder_of(model)
        if HEAD in self.prefixes:
            return Head.of(model)(final_norm_of(model)(inputs))
        if self.layer is None:
            with only_layers(model, []):
                return decoder(input_ids=inputs, use_cache=False).last_hidden_state
        layer = layers_of(model)[self.layer]
        # The model prepares the layer's other arguments; its scaling of embeddings was applied in the first part.
        hook = layer.register_forward_pre_hook(lambda module, arguments: (inputs, *arguments[1:]))
        try:
            with only_layers(model, [layer]):
                return decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
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
    """Transplant the teacher in `source` into its host's class: weights and configuration in the folder `target`.

    The files have the checkpoint's dtype and the size of the teacher's; the host's outputs are proven in float32. Peak
    memory is one file of the result, and of one layer the weights of teacher and host in float32 or the teacher's in
    float64.

    Args:
        source: The teacher's folder.
        target: An existing, empty folder.
        settings: The host's own, such as `{"mamba_expand": 1}`.
        device: Where layers are compared; None, or a device without float64: the CPU.
        report: Called with the parts done and all parts.
        allow_unused: See `take_stock`.

    Returns:
        The host's configuration, and the record of the transplant.

    Raises:
        UserError: no exact host, a checkpoint that is damaged, incomplete or has weights that are not used, or a part
            that differs by more than the tolerance.
    """
    config = load_config(source)
    host, own = configure(config, settings)
    use_kernels(host.model_type)
    reader, device = ShardReader(source), with_float64(device or torch.device("cpu"))
    writer = ShardWriter(target, reader.largest_bytes if len(reader.files) > 1 else None)
    require_layers(config, reader.dtypes, source)
    teacher, model = without_weights(config), without_weights(own, host.model_class)
    stock = take_stock(teacher, reader.dtypes, source, allow_unused)
    for each in (teacher, model):
        _buffers_to(each, device)
    dtype = cast(torch.dtype, config.dtype or torch.float32)
    rounded = dtype if dtype in (torch.bfloat16, torch.float16) else None
    compared = _Probe(host, teacher, model, rounded, probe(config).to(device))
    parts = _parts(config, stock.taken)
    for number, part in enumerate(parts):
        report(number, len(parts))
        _read(teacher, part, reader, source, device)
        _fill(model, part, host.state(config, part.of(teacher.state_dict())))
        writer.add(_stored(model, part), dtype)
        compared.run(part)
    moved = compared.finish()
    writer.finish()
    model.config.dtype, model.config.architectures = dtype, [host.name]
    model.config.save_pretrained(target)
    cast(Any, teacher.generation_config).save_pretrained(target)
    report(len(parts), len(parts))
    return model.config, replace(moved, notices=stock.notices)


class _Probe:
    """Runs the probe batch through the parts, in each compared form of teacher and host."""

    def __init__(
        self,
        host: Host,
        teacher: PreTrainedModel,
        model: PreTrainedModel,
        rounded: torch.dtype | None,
        ids: torch.Tensor,
    ):
        self._host, self._teacher, self._model, self._rounded = host, teacher, model, rounded
        self._states = dict.fromkeys(("teacher", "host", "exact", "rounded teacher", "rounded host"), ids)
        self._proofs: dict[str, Proof] = {}

    def run(self, part: _Part) -> None:
        """Run one part, which is in memory in float32, in each form, and free its weights.

        Raises:
            UserError: on the teacher's own hidden states the host's outputs differ by more than the tolerance.
        """
        states, inputs = self._states, self._states["teacher"]
        states["teacher"] = part.run(self._teacher, inputs)
        output = part.run(self._model, inputs)
        states["host"] = part.run(self._model, states["host"])
        if self._rounded:
            _round(self._model, self._rounded)
            states["rounded host"] = part.run(self._model, states["rounded host"])
        _free(self._model)
        with in_float64(self._teacher):
            exact = part.run(self._teacher, inputs.double() if inputs.is_floating_point() else inputs)
            states["exact"] = part.run(self._teacher, states["exact"])
        if self._rounded:
            _round(self._teacher, self._rounded)
            states["rounded teacher"] = part.run(self._teacher, states["rounded teacher"])
        _free(self._teacher)
        self._proofs[part.name] = Proof.of(states["teacher"], output, exact)
        self._proofs[part.name].require(self._host, f"the outputs of {part.name}")

    def finish(self) -> Moved:
        """Compare the logits.

        Raises:
            UserError: they differ by more than the tolerance.
        """
        proof = Proof.of(*(self._states[form] for form in ("teacher", "host", "exact")))
        proof.require(self._host, "logits")
        if not self._rounded:
            return Moved(proof, self._proofs, None)
        exact, *rounded = (
            F.log_softmax(self._states[form].float(), -1).flatten(0, 1)
            for form in ("teacher", "rounded teacher", "rounded host")
        )
        own, hosts = (F.kl_div(each, exact, log_target=True, reduction="batchmean").item() for each in rounded)
        return Moved(proof, self._proofs, hosts / own)


def _parts(config: PreTrainedConfig, taken: Mapping[str, str]) -> list[_Part]:
    """The parts in the order in which they run; `taken` maps each stored name to a weight of the model."""

    def part(name: str, *prefixes: str, also: str = "", layer: int | None = None) -> _Part:
        read = (*prefixes, also) if also else prefixes
        return _Part(name, [name for name, weight in taken.items() if weight.startswith(read)], prefixes, layer)

    return [
        part("the embedding", EMBEDDING),
        *(part(f"layer {n}", layer_prefix(n), layer=n) for n in range(config.num_hidden_layers)),
        part("the head", FINAL_NORM, HEAD, also=EMBEDDING if config.tie_word_embeddings else ""),
    ]


def _read(teacher: PreTrainedModel, part: _Part, reader: ShardReader, source: Path, device: torch.device) -> None:
    """Fill one part of `teacher` in float32, as `from_pretrained` does: weights renamed, experts stacked.

    Raises:
        UserError: a weight is damaged, of another shape or not finite; or a stored head differs from the embedding that
            the configuration ties it to.
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
        raise unreadable(source, ValueError(problems[0].strip().splitlines()[-1]))  # A traceback comes before it.
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
    """The weights of one part as `save_pretrained` stores them: experts one by one, no tied head."""
    state = part.of(model.state_dict())
    if model.config.tie_word_embeddings:
        state = {name: weight for name, weight in state.items() if not name.startswith(HEAD)}
    return revert_weight_conversion(model, state)


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights alone, as loading in `dtype` does it: the rotary frequencies stay in float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _free(model: PreTrainedModel) -> None:
    """Replace all weights by their shapes, on the device `meta` in float32."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty_like(weight, device="meta", dtype=torch.float32)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _buffers_to(model: PreTrainedModel, device: torch.device) -> None:
    """Move the buffers, such as rotary frequencies; weights are on the device `meta`."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
