"""A plan that the user gives instead of a search, checked against the space of the run's host before any work."""

import re
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from flashmorph.errors import UserError, quoted
from flashmorph.hosts import configure, layer_space
from flashmorph.mixers import LINEAR, SLIDING
from flashmorph.plan import FULL, Budget, Plan, Space
from flashmorph.recipe.recipe import Recipe

_NUMBER = re.compile(r"-?[0-9]{1,9}")
_OTHER_HOST = {
    SLIDING: "it was chosen with sliding windows, so set them here too: --set host.window=TOKENS",
    LINEAR: "it was chosen without sliding windows, so leave host.window out",
}


def given_plan(
    teacher: str,
    config: PreTrainedConfig,
    recipe: Recipe,
    path: Path | None,
    layers: str | None,
    revision: str = "",
) -> Plan | None:
    """The plan in a file, or of these layers, for a teacher of this name, configuration and revision; None where none
    is given.

    Raises:
        UserError: both are given, the file is no plan, or see `require_fits`.
    """
    if path is not None and layers is not None:
        raise UserError("give --plan or --layers, not both")
    if layers is not None:
        plan = replace(plan_of_layers(space_of_run(config, recipe), layers), teacher=teacher, revision=revision)
    elif path is not None:
        plan = Plan.load(path)
    else:
        return None
    space = space_of_run(config, recipe, plan)
    require_fits(plan, space, f"--layers {quoted(layers)}" if path is None else str(path))
    return plan


def space_of_run(config: PreTrainedConfig, recipe: Recipe, plan: Plan | None = None) -> Space:
    """The space of plans of the host that the recipe moves a teacher of this configuration into.

    Its groups are layers, or heads where those are what `plan` is about.

    Raises:
        UserError: the plan is about heads, and the host takes whole layers.
    """
    host, own = configure(config, recipe.host)
    if plan and plan.has_heads and not host.by_head:
        raise UserError(
            f"the plan chooses key-value heads, and {host.name} takes whole layers: name the mixers that it was chosen "
            f"with, --mixers {','.join(sorted(set(plan.assignments.values()), key=FULL.__ne__))}"
        )
    return layer_space(host, own, plan.granularity if plan else Budget("layers", 1))


def plan_of_layers(space: Space, layers: str) -> Plan:
    """The plan that keeps these layers full: `1,2,6`.

    Raises:
        UserError: not a list of layer numbers, or one that there is not, or that stands twice.
    """
    parts = [part.strip() for part in layers.split(",")]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        raise UserError(f"--layers {quoted(layers)} must be layer numbers with commas, for example 1,2,6")
    numbers, last = [int(part) for part in parts], len(space.groups) - 1
    for index, number in enumerate(numbers):
        if not 0 <= number <= last:
            raise UserError(f"--layers: there is no layer {number}; the layers are 0 to {last}")
        if number in numbers[:index]:
            raise UserError(f"--layers: layer {number} stands twice")
    return space.plan([f"layers.{number}" for number in numbers], Budget("layers", len(numbers)))


def require_fits(plan: Plan, space: Space, name: str) -> None:
    """Refuse a plan of another model or another host, and one that is no hybrid; `name` is for messages.

    Raises:
        UserError: see above.
    """
    for group, option in plan.assignments.items():
        if option in _OTHER_HOST and option not in space.options:
            raise UserError(
                f"{name}: {group} has the option {option!r}, and layers can be {' or '.join(space.options)} here; "
                f"{_OTHER_HOST[option]}"
            )
    try:
        space.one_hot(plan)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    full = [option for option in plan.assignments.values() if option == FULL]
    if not 0 < len(full) < len(space.groups):
        kept = f"no {plan.unit.removesuffix('s')}" if not full else f"all {len(full)} {plan.unit}"
        raise UserError(f"{name} keeps {kept} full; a hybrid keeps at least one and not all")
