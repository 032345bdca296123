"""A plan that the user gives instead of a search."""

from dataclasses import replace
from pathlib import Path

from flashmorph.errors import UserError
from flashmorph.plan import Budget, Plan, Space
from flashmorph.run import Run
from flashmorph.teacher import load_config


def plan_from_file(run: Run, path: Path) -> Plan:
    """A plan that was saved before, for a teacher of the same shape.

    Raises:
        UserError: no plan, or one for another model.
    """
    plan = Plan.load(path)
    Space.of_layers(load_config(run.teacher.folder).num_hidden_layers).one_hot(plan)
    return plan


def plan_from_layers(run: Run, layers: str) -> Plan:
    """The plan that keeps these layers full: `1,2,6`.

    Raises:
        UserError: not a list of layer numbers, or all layers, or one that there is not.
    """
    try:
        numbers = sorted({int(number) for number in layers.split(",")})
    except ValueError as error:
        raise UserError(f"--layers {layers!r} must be layer numbers with commas, for example 1,2,6") from error
    space = Space.of_layers(load_config(run.teacher.folder).num_hidden_layers)
    budget = Budget("layers", len(numbers))
    space.limit(budget)
    return replace(space.plan([f"layers.{number}" for number in numbers], budget), teacher=run.teacher.name)


def given_plan(run: Run, path: Path | None, layers: str | None) -> Plan | None:
    """The plan in a file, or of these layers; None where neither is given.

    Raises:
        UserError: both are given, or see the two.
    """
    if path and layers:
        raise UserError("give --plan or --layers, not both")
    if path:
        return plan_from_file(run, path)
    return plan_from_layers(run, layers) if layers else None
