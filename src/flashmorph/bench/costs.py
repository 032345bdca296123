"""Costs of layers and heads, measured: hybrids with few and with many groups switched, in turns (docs/decisions/0033).

The models share their weights. Each reads the context once; in every round it writes tokens after a copy of the cache
that this left, in an order that rotates. Differences are taken within rounds.
"""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from flashmorph.bench.growth import spread
from flashmorph.bench.limit import timed
from flashmorph.bench.run import BenchSettings, read_context, write_token
from flashmorph.convert.load import load_config, load_model
from flashmorph.devices import device_name, dtype_name
from flashmorph.hosts import configure, host_of, shape_of
from flashmorph.hosts.build import empty_model
from flashmorph.model.morphable import Morphable
from flashmorph.own import CACHE
from flashmorph.plan import FULL, Budget, Costs, Plan, Space
from flashmorph.progress import Report, silent
from flashmorph.records import Figures

_LOG = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Two plans for one option: `few` groups have it, and `many`; all others are full."""

    few: Plan
    many: Plan

    @property
    def between(self) -> int:
        """By how many groups the two differ."""
        return _switched(self.many) - _switched(self.few)


def model_for_costs(
    teacher: Path,
    settings: Mapping[str, Any],
    dtype: torch.dtype | str,
    device: torch.device,
    say: Callable[[str], None] = _LOG.warning,
    allow_unused: bool = False,
) -> PreTrainedModel:
    """The teacher in `teacher`, in the host that these host `settings` move it into, as `measure_costs` takes it.

    What is timed are shapes, so that the move is not proven: in a smaller dtype it need not be exact.

    Raises:
        UserError: see `load_model` and `configure`.
    """
    config = load_config(teacher)
    host, own = configure(config, settings)
    opened = load_model(teacher, dtype, device, say, allow_unused)
    model = empty_model(host, own, host.state(config, opened.state_dict()))
    model.config.dtype = model.dtype
    return model


@torch.no_grad()
def measure_costs(
    model: PreTrainedModel, teacher: str, settings: BenchSettings, report: Report = silent
) -> tuple[Costs, Figures]:
    """The costs of a host's model with every layer full, at the one context of `settings`, and what they come from.

    Groups of a host are alike, so that all share one measurement of each option: of its `pair`, the difference in time
    for each group that it is about. What is left of the time of `few` is that of every plan; of several options the
    larger one. The figures are seconds with quartiles, of the full model, of each option's pair, and of a group.

    Args:
        model: The host's, on the device and in the dtype that costs are asked for; it is left with branches.
        teacher: Its name, for messages.
        settings: One length, rounds and tokens in each.
        report: Called with the progress.

    Raises:
        UserError: the differences are larger than the whole; see `Costs.of_seconds`.
    """
    host, config, device, dtype = host_of(model.config), copy.deepcopy(model.config), model.device, model.dtype
    morphable = Morphable(model)
    space = morphable.space(Budget("heads" if host.by_head else "layers", 1))
    pairs = {option: pair(space, option) for option in space.options if option != FULL}
    plans = {FULL: space.plan(space.groups, space.count(len(space.groups)))}
    plans |= {f"{size} {option}": plan for option, both in pairs.items() for size, plan in both._asdict().items()}
    seconds = {
        name: np.array(each)
        for name, each in time_tokens(
            {name: morphable.instantiate(plan, dtype, shared=True) for name, plan in plans.items()}, settings, report
        ).items()
    }
    extra = {
        option: (seconds[f"many {option}"] - seconds[f"few {option}"]) / both.between for option, both in pairs.items()
    }
    full = max(
        float(np.median(seconds[f"few {option}"] - _switched(both.few) * extra[option]))
        for option, both in pairs.items()
    )
    costs = Costs.of_seconds(
        full,
        {FULL: 0.0, **{option: float(np.median(each)) for option, each in extra.items()}},
        space.groups,
        teacher=teacher,
        host=host.name,
        shape=shape_of(host, config),
        context=settings.lengths[0],
        source=source_here(device, dtype),
    )
    spreads = {name: spread(each.tolist()) for name, each in seconds.items()}
    groups = {option: spread(each.tolist()) for option, each in extra.items()}
    return costs, {**settings.model_dump(mode="json"), "seconds": spreads, "seconds_of_a_group_beyond_full": groups}


def source_here(device: torch.device, dtype: torch.dtype) -> Figures:
    """`Costs.source` of what is measured on this device."""
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"kind": "measured", "device": device_name(device), "dtype": dtype_name(dtype), **threads}


def pair(space: Space, option: str) -> Pair:
    """The hybrids whose difference is the cost of `option`: from one switched layer to all but one.

    The first layer stays full, since transformers has no cache for a model without a full one. Of heads `few` are the
    last one of every layer, since a layer of two kinds runs both of its mixers. Where the two would be about as many
    groups, as in a model of two layers, no group has the option in `few`.
    """
    few = {rows[-1] for rows in space.layers} if len(space.layers[0]) > 1 else {len(space.groups) - 1}
    many = set(range(len(space.groups))) - set(space.layers[0])
    return Pair(*(_plan(space, rows, option) for rows in (few if len(few) < len(many) else set(), many)))


def _plan(space: Space, switched: Collection[int], option: str) -> Plan:
    options = {group: option if row in switched else FULL for row, group in enumerate(space.groups)}
    return Plan(options, space.count(len(space.groups) - len(switched)))


def _switched(plan: Plan) -> int:
    return len(plan.assignments) - len(plan.full_groups)


@torch.no_grad()
def time_tokens(
    models: Mapping[str, PreTrainedModel], settings: BenchSettings, report: Report = silent
) -> dict[str, list[float]]:
    """Seconds of a token after the one context of `settings`, by model, `[repeats]`: the median of each turn's tokens.

    A first round warms up and is not timed.
    """
    (context,) = settings.lengths
    names, first = list(models), next(iter(models.values()))
    size = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(size, (1, context), generator=generator).to(first.device)
    caches: dict[str, Any] = {name: read_context(model, ids)[CACHE] for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(settings.repeats + 1):
        for index in range(len(names)):
            name = names[(turn + index) % len(names)]
            cache = copy.deepcopy(caches[name])
            steps = [
                timed(lambda name=name, cache=cache: write_token(models[name], ids, cache), first.device)
                for _ in range(settings.decode_tokens)
            ]
            if turn:
                seconds[name].append(float(np.median(steps)))
        report(turn + 1, settings.repeats + 1)
    return seconds
