"""The value `auto`: how many tokens run at once, and whether layers run again, from a device's memory.

By the formulas of `flashmorph estimate` (`memory.py`), from the memory that the device has in all, so that the
choice does not depend on what else runs there. No result depends on it, so it is in no digest.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from flashmorph.errors import UserError
from flashmorph.estimate.memory import Memory, stage_memory
from flashmorph.estimate.sizes import Sizes
from flashmorph.estimate.work import Model
from flashmorph.files import write_json
from flashmorph.inputs.shapes import read_as
from flashmorph.recipe.preflight import COMPARE
from flashmorph.recipe.recipe import Recipe, setting, with_settings
from flashmorph.records import Figures, SettingValues
from flashmorph.selection import STRATEGIES
from flashmorph.stages import TrainSettings
from flashmorph.units import byte_size, listed

AUTO = "auto"
"""`flashmorph compare` searches and distils, whatever the recipe's strategy."""
_FILE = "auto.json"
_MEMORY = "auto_memory.json"
_LESS = 0.95
"""A device with a smaller share of the memory than this is not the one that numbers were chosen for."""
_LOG = logging.getLogger(__name__)
_ENOUGH_TOKENS = {"cpu": 1_024}
_ENOUGH_ON_A_GPU = 4_096
"""Layers run again where fewer tokens than these would run at once without it: so many keep a device busy."""
_EVALUATED_AT_ONCE = 8_192
"""On a CPU, which more at once makes slower (docs/decisions/0023)."""
_SHARING = ("align", "distill", "extend")
HEAVY = ("align", "select", "distill", "extend")
"""The stages that several processes may share the weights of."""
_SEARCHES = ("select", "curve", "signal", COMPARE)


class Capacity(NamedTuple):
    """What one process may fill: `bytes` on its device, as one of so many `processes` that may divide the weights.

    `kind` is that of the device.
    """

    bytes: float
    processes: int = 1
    shard: bool = False
    bf16: bool = True
    kind: str = "cuda"

    @property
    def sharing(self) -> int:
        """Processes that hold the weights together."""
        return self.processes if self.shard else 1


class Choice(NamedTuple):
    """What `auto` comes to: the value by the name of its setting; `too_large` are the sections that no row fits of."""

    values: SettingValues
    too_large: list[str]


def asked(recipe: Recipe, stage: str) -> list[str]:
    """The settings of a stage that are `auto`."""
    return [key for key in _settings_of(recipe, stage) if setting(recipe, key) == AUTO]


def choose(stage: str, recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity) -> Choice:
    """Numbers for the settings of a stage that are `auto`: as many rows as fit, one where none does."""
    found = Choice({}, [])
    taken = 0.0
    for section in _sections(recipe, stage):
        name = stage if section == "distill" and stage == "logits" else section
        name = "select" if section == "select.search" else name
        if name not in _memory(recipe, model, sizes, capacity):
            continue
        left = capacity._replace(bytes=capacity.bytes - taken)
        if section == "select.search":
            values, fits, memory = _of_search(recipe, model, sizes, left)
            taken = memory._replace(tokens=0).bytes(capacity.sharing)
        elif section == "evaluate":
            values, fits = _of_evaluation(recipe, model, sizes, left)
        else:
            values, fits = _of_training(name, section, recipe, model, sizes, left)
        wanted = asked(recipe, stage)
        found.values.update({key: value for key, value in values.items() if key in wanted})
        if not fits and any(key.startswith(section) for key in found.values):
            found.too_large.append(section)
    return found


def must_shard(recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity) -> bool:
    """Whether several processes must share the weights: some stage cannot run one row where each holds all of them."""
    if capacity.processes < 2 or recipe.shard != AUTO:
        return capacity.processes > 1 and recipe.shard is True
    return bool(too_large(recipe, model, sizes, capacity._replace(shard=False)))


def too_large(
    recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity, stages: Collection[str] = HEAVY
) -> dict[str, float]:
    """The bytes that one row takes in those of `stages` of which not one row fits, layers running again."""
    again = [f"{stage}.activation_checkpointing" for stage in _SHARING]
    smallest = with_settings(recipe, {key: True for key in again if setting(recipe, key) == AUTO})
    memory = _memory(smallest, model, sizes, capacity)
    return {
        name: memory[name]._replace(tokens=memory[name].length).bytes(capacity.sharing)
        for name in HEAVY
        if name in stages and name in memory and not memory[name].tokens_within(capacity.bytes, capacity.sharing)
    }


def too_large_in_words(large: Mapping[str, float], capacity: Capacity) -> str:
    """A sentence about what `too_large` gave, and what would help."""
    each = listed(f"{name} ({byte_size(needed)})" for name, needed in large.items())
    does = "do" if len(large) > 1 else "does"
    device = "this device" if capacity.processes == 1 else f"each of {capacity.processes} devices"
    helps = ["share the weights among several GPUs (torchrun)" if capacity.processes == 1 else "take more GPUs"]
    helps.append("take a smaller teacher")
    if set(large) <= {"distill", "extend"}:
        helps.append("end before distillation (`flashmorph build`)")
    return (
        f"{each} {does} not fit into the {byte_size(capacity.bytes)} that {device} can give, even with one row at "
        f"once, by the formulas of `flashmorph estimate`: {', '.join(helps[:-1])} or {helps[-1]}"
    )


def resolved(
    stage: str, recipe: Recipe, folder: Path, model: Model, sizes: Sizes, capacity: Capacity
) -> tuple[Recipe, list[str]]:
    """The recipe with numbers in place of a stage's `auto`, and the sections that no row fits of.

    Chosen once and kept in the stage's `folder`: it goes on with the same numbers on any machine that has the memory.
    """
    kept = chosen(folder) if capacity.bytes >= _LESS * _chosen_for(folder) else {}
    too_large: list[str] = []
    if missing := [key for key in asked(recipe, stage) if key not in kept]:
        found = choose(stage, recipe, model, sizes, capacity)
        kept |= {key: found.values[key] for key in missing if key in found.values}
        too_large = found.too_large
        # In this order: numbers without the memory that they were chosen for would count on any machine.
        write_json(folder / _MEMORY, capacity.bytes)
        write_json(folder / _FILE, kept)
    return with_settings(recipe, {key: kept[key] for key in asked(recipe, stage) if key in kept}), too_large


def chosen(folder: Path) -> Figures:
    """What was chosen for the stage in `folder`, by the names of the settings."""
    if not (folder / _FILE).exists():
        return {}
    try:
        return read_as(folder / _FILE, dict[str, bool | Annotated[int, Field(ge=1, le=10**12)]])
    except UserError as error:
        _LOG.warning("%s; choosing again", error)
        return {}


def _chosen_for(folder: Path) -> float:
    """The bytes that the stage in `folder` could fill when its numbers were chosen; 0 where nothing says so."""
    try:
        return read_as(folder / _MEMORY, Annotated[float, Field(ge=0)]) if (folder / _MEMORY).exists() else 0.0
    except UserError:
        return 0.0


def _sections(recipe: Recipe, stage: str) -> list[str]:
    if stage in _SEARCHES:
        trains = stage == COMPARE or stage != "signal" and STRATEGIES[recipe.select.strategy].needs_training
        return ["select.search", *(["distill"] if trains else [])]
    if stage in ("align", "distill", "extend", "evaluate"):
        return [stage]
    return {"logits": ["distill"], "teacher": ["evaluate"]}.get(stage, [])


def _settings_of(recipe: Recipe, stage: str) -> Iterator[str]:
    for section in _sections(recipe, stage):
        if section == "evaluate":
            yield "evaluate.batch_tokens"
            continue
        yield f"{section}.micro_batch_tokens"
        if stage != "logits":
            yield f"{section}.activation_checkpointing"


def _of_training(
    name: str, section: str, recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity
) -> tuple[SettingValues, bool]:
    """The values of one stage that trains, and whether a row of it fits."""
    settings = getattr(recipe, section)
    length, number = settings.length, settings.micro_batch_tokens
    micro, again = f"{section}.micro_batch_tokens", f"{section}.activation_checkpointing"
    values: SettingValues = {}

    def within() -> int:
        memory = _memory(with_settings(recipe, values), model, sizes, capacity)[name]
        return memory.tokens_within(capacity.bytes, capacity.sharing)

    if setting(recipe, again) == AUTO and name != "logits":
        step = max(1, settings.batch_rows // capacity.processes) * length
        busy = _ENOUGH_TOKENS.get(capacity.kind, _ENOUGH_ON_A_GPU) if number == AUTO else number
        enough = step if busy is None else min(step, busy)
        values[again] = False
        values[again] = within() < max(length, enough // length * length)
    most = within()
    if number == AUTO:
        rows = range(1, max(1, min(most // length, settings.batch_rows)) + 1)
        # A step is cut evenly, so a larger micro-batch can leave each process fewer rows at once.
        values[micro] = length * max(rows, key=lambda number: (_at_once(settings, number, capacity.processes), number))
    return values, most >= length


def _at_once(settings: TrainSettings, rows: int, processes: int) -> int:
    """Rows that a process runs at once where micro-batches have `rows`."""
    micro = {"micro_batch_tokens": rows * settings.length}
    return settings.model_copy(update=micro).division(processes).rows


def _memory(recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity) -> dict[str, Memory]:
    return stage_memory(model, sizes, recipe, capacity.processes, capacity.bf16, capacity.kind)


def _of_search(recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity) -> tuple[SettingValues, bool, Memory]:
    """As many rows as fit, at most those of a step of the longest; a search that would keep much runs layers again."""
    search, key = recipe.select.search, "select.search.micro_batch_tokens"
    if search.micro_batch_tokens != AUTO:
        return {}, True, _memory(recipe, model, sizes, capacity)["select"]
    for rows in range(max(1, search.batch_tokens // search.longest), 0, -1):
        values = {key: rows * search.longest}
        memory = _memory(with_settings(recipe, values), model, sizes, capacity)["select"]
        if memory.bytes(capacity.sharing) <= capacity.bytes:
            return values, True, memory
    return {key: search.longest}, False, memory


def _of_evaluation(recipe: Recipe, model: Model, sizes: Sizes, capacity: Capacity) -> tuple[SettingValues, bool]:
    """As many questions as fit and are of use, at most all of a task, or the text."""
    settings = recipe.evaluate
    most = stage_memory(model, sizes, recipe, 1, capacity.bf16, capacity.kind)["evaluate"].tokens_within(capacity.bytes)
    # Every process has a batch of its own.
    questions, tokens = (-(-each // capacity.processes) for each in (settings.questions, settings.perplexity_tokens))
    needed = max(questions * settings.length, tokens)
    useful = _EVALUATED_AT_ONCE if capacity.kind == "cpu" else needed
    return {"evaluate.batch_tokens": max(settings.length, min(most, needed, useful))}, most >= settings.length
