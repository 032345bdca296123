"""Everything that a run will take, in one object: for people (`flashmorph estimate`), and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from flashmorph.devices import usable
from flashmorph.errors import UserError
from flashmorph.estimate.auto import Capacity, choose, must_shard, too_large
from flashmorph.estimate.gpus import Gpu
from flashmorph.estimate.memory import Memory, stage_memory
from flashmorph.estimate.sizes import Sizes, count_sizes
from flashmorph.estimate.work import (
    Model,
    Work,
    align_work,
    distill_work,
    evaluate_work,
    extend_work,
    logits_work,
    model_of,
    select_work,
    signal_work,
    teacher_work,
)
from flashmorph.hosts import cache_bytes
from flashmorph.hosts.vllm_cache import VllmCache, unpadded, vllm_cache
from flashmorph.plan import FULL, Budget
from flashmorph.recipe.outlook import check_recipe, outlook
from flashmorph.recipe.pricing import budget_of_recipe
from flashmorph.recipe.recipe import Recipe, with_settings
from flashmorph.records import Figures, SettingValues
from flashmorph.selection import STRATEGIES

UTILISATION = 0.3
"""Share of a GPU's peak that hours assume by default. An assumption: nothing here has measured it."""
CONTEXTS = (8_192, 32_768, 131_072)
MOST_GPUS = 64
_FLOAT32_STAGES = ("transplant", "teacher", "evaluate")


@dataclass(frozen=True)
class Stage:
    """One stage: `tokens` is None where only the search itself will tell, and so are then `work` and hours.

    `mean_context` is that of `outlook`; `auto` is what the settings come to that have this value, by their names.
    """

    name: str
    tokens: int | None
    length: int
    mean_context: float | None
    data: str
    work: Work | None
    memory: Memory | None
    auto: SettingValues


@dataclass(frozen=True)
class Estimate:
    """What `flashmorph estimate` shows. `cache` is bytes of one sequence by context, for the teacher and the hybrid."""

    teacher: str
    model: Model
    sizes: Sizes
    budget: Budget
    cache: dict[int, tuple[int, int]]
    stages: list[Stage]
    gpu: Gpu | None
    num_gpus: int
    utilisation: float
    sharded: bool = False
    """Whether a run on these GPUs would shard its weights."""
    least_gpus: int | None = None
    """The fewest GPUs that fit a row of every stage that trains or searches; None without a GPU, or where none do."""

    @property
    def in_vllm(self) -> tuple[VllmCache, VllmCache] | None:
        """The caches of the teacher and the hybrid in vLLM; None where it does not serve the host."""
        model = self.model
        options = [FULL] * model.kept + [model.switched] * (model.groups - model.kept)
        teacher = vllm_cache(model.host, model.config, [FULL] * model.groups)
        hybrid = vllm_cache(model.host, model.hybrid, options)
        return (teacher, hybrid) if teacher and hybrid else None

    @property
    def hybrid_parameters(self) -> int:
        """Parameters of the hybrid."""
        return self.sizes.hybrid(self.model.switched, self.model.num_full)

    def hours(self, stage: Stage) -> float | None:
        """Hours of a stage: operations that kernels do, by what the GPUs do at `utilisation`.

        None without a GPU, where the work is unknown, and for what runs in float32.
        """
        if not self.gpu or not stage.work or stage.name in _FLOAT32_STAGES:
            return None
        return stage.work.causal / (self.num_gpus * self.gpu.flops * self.utilisation) / 3600

    @property
    def total_hours(self) -> float | None:
        """The sum of all hours that are known; None without a GPU."""
        return sum(self.hours(stage) or 0.0 for stage in self.stages) if self.gpu else None

    def seconds_per_token(self, parameters: int, cache: int) -> float | None:
        """The least time that a generated token takes: its weights and its cache are read once from memory.

        Weights in the teacher's dtype, without experts that are not chosen; an embedding that is not also the head is
        looked up, not read.
        """
        if not self.gpu:
            return None
        config = self.model.config
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return (self.weight_bytes(parameters - looked_up - self.sizes.idle) + cache) / self.gpu.bandwidth

    def weight_bytes(self, parameters: int) -> int:
        """Bytes of weights in the teacher's dtype."""
        return parameters * torch.empty(0, dtype=cast(Any, self.model.config.dtype)).element_size()

    def to_dict(self) -> Figures:
        """The JSON form: bytes, hours, operations."""
        models = {"teacher": (self.sizes.teacher, 0), "hybrid": (self.hybrid_parameters, 1)}
        vllm = self.in_vllm
        return {
            "teacher": self.teacher,
            "host": self.model.host.name,
            "layers": self.model.layers,
            "full_layers": self.model.num_full,
            "budget": str(self.budget),
            "gpu": self.gpu and self.gpu._asdict(),
            "num_gpus": self.num_gpus,
            "utilisation": self.utilisation,
            "hours": self.total_hours,
            "least_gpus": self.least_gpus,
            "models": {
                name: {
                    "parameters": parameters,
                    "cache_bytes": {str(context): cache[index] for context, cache in self.cache.items()},
                    "vllm_cache_bytes": vllm
                    and {str(context): vllm[index].sequence_bytes(context) for context in self.cache},
                    "least_seconds_per_token": {
                        str(context): self.seconds_per_token(parameters, cache[index])
                        for context, cache in self.cache.items()
                    },
                }
                for name, (parameters, index) in models.items()
            },
            "vllm_padded_layers": vllm and vllm[1].groups.padded,
            "vllm_unpadded_full_layers": vllm and unpadded(self.model.layers),
            "stages": [
                {
                    "stage": stage.name,
                    "tokens": stage.tokens,
                    "length": stage.length,
                    "mean_context": stage.mean_context,
                    "data": stage.data,
                    "flops": stage.work and stage.work.flops,
                    "flops_causal": stage.work and stage.work.causal,
                    "hours": self.hours(stage),
                    "memory_bytes": stage.memory and stage.memory.bytes(),
                    "memory_bytes_sharded": stage.memory and stage.memory.bytes(self.num_gpus),
                    "auto": stage.auto,
                }
                for stage in self.stages
            ],
        }


def estimate(
    teacher: str,
    config: PreTrainedConfig,
    recipe: Recipe,
    gpu: Gpu | None = None,
    num_gpus: int = 1,
    utilisation: float = UTILISATION,
    contexts: Sequence[int] = CONTEXTS,
) -> Estimate:
    """What a run on a teacher of this configuration takes. No weight is read.

    Raises:
        UserError: no exact host, a recipe that does not fit the teacher, or a budget that is no number of layers.
    """
    check_recipe(config, recipe)
    budget = budget_of_recipe(config, recipe)
    if STRATEGIES[recipe.select.strategy].finds_budget:
        raise UserError(
            f"strategy {recipe.select.strategy} finds the number of full layers only as it trains: estimate with "
            "another one, and the budget that you expect"
        )
    model = model_of(config, recipe)
    own, hybrid = model.config, model.hybrid
    sizes = count_sizes(model.host, config, own)
    bf16 = recipe.bf16 is not False
    capacity = Capacity(usable(gpu.memory_bytes) if gpu else 0.0, num_gpus, bf16=bf16)
    sharded = must_shard(recipe, model, sizes, capacity) if gpu else recipe.shard is True
    least = _least_gpus(recipe, model, sizes, capacity) if gpu else None
    values = _at_once(recipe, model, sizes, gpu, capacity._replace(shard=sharded))
    memory = {
        name: stage_memory(model, sizes, with_settings(recipe, own_values), num_gpus, bf16).get(name)
        for name, own_values in values.items()
    }
    # Of the two stages that take the same rows, `distill` says how they are computed.
    recipe = with_settings(recipe, {key: value for each in values.values() for key, value in each.items()})
    cache = {context: (cache_bytes(own, context), cache_bytes(hybrid, context)) for context in contexts}
    work = {
        "teacher": teacher_work(model, recipe),
        "align": align_work(model, recipe),
        "signal": signal_work(model, recipe),
        "select": select_work(model, recipe),
        "distill": distill_work(model, recipe),
        "evaluate": evaluate_work(model, recipe),
    }
    if recipe.distill.teacher_logits:
        work["logits"] = logits_work(model, recipe)
    if recipe.extend:
        work["extend"] = extend_work(model, recipe)
    stages = [
        Stage(
            row["stage"],
            row["tokens"],
            row["length"],
            row["mean_context"],
            row["data"],
            work.get(row["stage"]),
            memory.get(row["stage"]),
            values.get(row["stage"], {}),
        )
        for row in outlook(teacher, config, recipe)
    ]
    return Estimate(teacher, model, sizes, budget, cache, stages, gpu, num_gpus, utilisation, sharded, least)


def _least_gpus(recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity) -> int | None:
    """As `Estimate.least_gpus`, by the rule that a run goes by; numbers that cannot share a batch are left out."""
    for number in range(1, MOST_GPUS + 1):
        try:
            several = capacity._replace(processes=number, shard=number > 1 and recipe.shard is not False)
            if not too_large(recipe, model, sizes, several):
                return number
        except UserError:
            continue
    return None


def _at_once(recipe: Recipe, model: Model, sizes: Sizes, gpu: Gpu | None, capacity: Capacity) -> dict[str, Figures]:
    """What `auto` would choose on the GPU, by stage; where none is named, one row at once and layers kept."""
    stages = ("transplant", "teacher", "align", "signal", "select", "build", "logits", "distill", "extend", "evaluate")
    found = {stage: choose(stage, recipe, model, sizes, capacity).values for stage in stages}
    if gpu:
        return found
    kept = {key: False for own in found.values() for key in own if key.endswith("activation_checkpointing")}
    return {name: own | {key: kept[key] for key in own if key in kept} for name, own in found.items()}
