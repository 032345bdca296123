"""The budget of a recipe; one in milliseconds with its costs, checked against the teacher."""

from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.hosts import Host, configure, shape_of
from flashmorph.plan import Budget, Costs
from flashmorph.recipe.recipe import Recipe


def budget_of_recipe(config: PreTrainedConfig, recipe: Recipe, text: str | None = None) -> Budget:
    """The recipe's budget, or the one in `text`, for a teacher of this configuration.

    Raises:
        UserError: it is no budget; or it is in milliseconds, and `select.costs` names no file of costs for this
            teacher, these settings of the host and this context. None named at all is left to `layer_space`.
    """
    budget = Budget.parse(text or recipe.budget)
    if not budget.is_time or recipe.select.costs is None:
        return budget
    path = recipe.select.costs
    costs = Costs.load(path)
    try:
        _require_same_shape(costs, *configure(config, recipe.host))
        return budget.priced(costs)
    except UserError as error:
        raise UserError(f"select.costs={path}: {error}") from error


def _require_same_shape(costs: Costs, host: Host, own: PreTrainedConfig) -> None:
    """Refuse costs of another model, host or mixers.

    Raises:
        UserError: names both.
    """
    options = {option for row in costs.groups.values() for option in row}
    if costs.host != host.name or options != set(host.mixers):
        raise UserError(
            f"the costs are those of {costs.host} with {', '.join(sorted(options))}, and this run makes {host.name} "
            f"with {', '.join(sorted(host.mixers))}: give the same --window, --mixers and --set host.* to both"
        )
    if costs.shape != shape_of(host, own):
        raise UserError(
            f"the costs are those of another shape (teacher {costs.teacher}): measure or estimate them for this "
            "teacher, with the same --window, --mixers and --set host.* as this run"
        )
