"""Models timed in turns, so that whatever slows the machine slows all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel

from flashmorph.bench.growth import Growth, crossing, exponent, spread
from flashmorph.bench.limit import Limit, Rates, measure_rates, timed
from flashmorph.bench.memory import peak_bytes
from flashmorph.devices import device_name, dtype_name
from flashmorph.hosts import cache_by_layer
from flashmorph.inputs.settings import Settings
from flashmorph.own import CACHE
from flashmorph.progress import Report, silent
from flashmorph.records import Figures

KINDS = ("prefill", "decode")


class BenchSettings(Settings):
    """Settings of the timing, of one sequence at a time."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    repeats: int = Field(default=5, gt=0, description="rounds in which every model has its turn at every length")
    decode_tokens: int = Field(default=8, gt=0, description="tokens written after each context")
    seed: int = 0


@dataclass
class _Measured:
    """One model's seconds `[lengths][repeats]` by kind, and its cache and memory by length."""

    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    cache: list[list[int]] = field(default_factory=list)
    memory: list[int | None] = field(default_factory=list)


@torch.no_grad()
def bench(models: Mapping[str, PreTrainedModel], settings: BenchSettings, report: Report = silent) -> Figures:
    """Seconds to read contexts and to write a token after them, cache and memory, of models on one device.

    Every round gives each model its turn at a length, in an order that rotates. The first round warms up and measures
    memory; it is not timed. Ratios to the first model are taken within rounds.
    """
    first = next(iter(models.values()))
    device, dtype = first.device, first.dtype
    generator = torch.Generator().manual_seed(settings.seed)
    measured = {name: _Measured() for name in models}
    names, total, done = list(models), len(models) * len(settings.lengths) * (settings.repeats + 1), 0
    before = measure_rates(device, dtype)
    for length in settings.lengths:
        size = min(model.config.vocab_size for model in models.values())
        ids = torch.randint(size, (1, length), generator=generator).to(device)
        for name in names:
            for kind in KINDS:
                measured[name].seconds[kind].append([])
        for turn in range(settings.repeats + 1):
            for index in range(len(names)):
                name = names[(turn + index) % len(names)]
                if turn == 0:
                    _warm_up(models[name], ids, measured[name], device)
                else:
                    _time(models[name], ids, settings.decode_tokens, measured[name], device)
                done += 1
                report(done, total)
    rates = before.best(measure_rates(device, dtype))
    lengths = list(settings.lengths)
    by_model = {
        name: _figures(measured[name], measured[names[0]] if name != names[0] else None, Limit(model, rates), lengths)
        for name, model in models.items()
    }
    return {"machine": _machine(device, dtype, rates), "settings": settings.model_dump(mode="json"), "models": by_model}


def _warm_up(model: PreTrainedModel, ids: torch.Tensor, measured: _Measured, device: torch.device) -> None:
    def work() -> None:
        cache = read_context(model, ids)[CACHE]
        measured.cache.append([_layer_bytes(layer) for layer in cache.layers])
        write_token(model, ids, cache)

    measured.memory.append(peak_bytes(work, device))


def _time(
    model: PreTrainedModel, ids: torch.Tensor, decode_tokens: int, measured: _Measured, device: torch.device
) -> None:
    parts: list[Any] = []
    measured.seconds["prefill"][-1].append(timed(lambda: parts.append(read_context(model, ids)), device))
    cache = parts[0][CACHE]
    steps = [timed(lambda: write_token(model, ids, cache), device) for _ in range(decode_tokens)]
    measured.seconds["decode"][-1].append(float(np.median(steps)))


def read_context(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """The output of a forward over `ids` `[1, time]`, with the cache that it leaves."""
    return cast(Any, model)(input_ids=ids, use_cache=True, logits_to_keep=1)


def write_token(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> None:
    """A forward over one token more, which `cache` then has as well."""
    # Which token it is makes no difference to the time.
    cast(Any, model)(input_ids=ids[:, :1], use_cache=True, **{CACHE: cache})


def _layer_bytes(layer: Any) -> int:
    """Bytes of the tensors that one layer of a cache holds."""
    tensors: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for each in value.values():
                collect(each)
        elif isinstance(value, list | tuple):
            for each in value:
                collect(each)

    collect(vars(layer))
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _figures(measured: _Measured, first: _Measured | None, limit: Limit, lengths: list[int]) -> Figures:
    figures: Figures = {}
    for kind in KINDS:
        growth = Growth(lengths, measured.seconds[kind])
        bound = [getattr(limit, kind)(length) for length in lengths]
        rows = [
            {**row, "limit": seconds, "of_limit": row["median"] / seconds}
            for row, seconds in zip(growth.to_list(), bound, strict=True)
        ]
        figures[kind] = {"by_length": rows, "exponent": exponent(lengths, growth.medians),
                         "exponent_of_limit": exponent(lengths, bound)}  # fmt: skip
        if first:
            ratios = [
                [one / other for one, other in zip(own, theirs, strict=True)]
                for own, theirs in zip(measured.seconds[kind], first.seconds[kind], strict=True)
            ]
            spreads = [spread(each) for each in ratios]
            figures[kind]["of_first"] = spreads
            figures[kind]["wins_from"] = crossing(lengths, [each["median"] for each in spreads])
    figures["cache"] = []
    for index, length in enumerate(lengths):
        expected = cache_by_layer(limit.model.config, length)
        row: Figures = {"length": length, "by_layer": measured.cache[index], "expected_by_layer": expected}
        row["bytes"], row["expected"] = sum(row["by_layer"]), sum(expected)
        if first:
            row["of_first"] = row["bytes"] / sum(first.cache[index])
        figures["cache"].append(row)
    figures["peak_memory"] = [
        {"length": length, "bytes": size} for length, size in zip(lengths, measured.memory, strict=True)
    ]
    return figures


def _machine(device: torch.device, dtype: torch.dtype, rates: Rates) -> Figures:
    facts = {
        "device": device_name(device),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
    }
    return {**facts, **rates.to_dict()}
