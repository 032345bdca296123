"""A recipe fitted to its teacher: contexts that nobody asked for by name end where the teacher's do."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.recipe.recipe import Recipe, setting, with_settings
from flashmorph.records import SettingValues

LENGTHS = ("align.length", "select.search.length", "distill.length", "extend.length", "evaluate.length")


def fit(recipe: Recipe, config: PreTrainedConfig, keys: Sequence[str] = LENGTHS) -> tuple[Recipe, str]:
    """The recipe with every length that was not given (`Recipe.given`) within the teacher's limit, and a line with
    those that were capped; empty where none was. Tokens and batches stay, so there are more rows."""
    limit = config.max_position_embeddings
    capped: SettingValues = {}
    for key in keys:
        value = setting(recipe, key)
        if value is not None and key not in recipe.given and _longest(value) > limit:
            capped[key] = min(value, limit) if isinstance(value, int) else tuple(min(end, limit) for end in value)
    if not capped:
        return recipe, ""
    changes = ", ".join(
        f"{key} {_in_words(setting(recipe, key))} -> {_in_words(value)}" for key, value in capped.items()
    )
    return with_settings(recipe, capped), f"the teacher's limit is {limit:,} tokens: {changes}"


def require_within_limit(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse contexts that the teacher does not have.

    Raises:
        UserError: names the setting.
    """
    limit = config.max_position_embeddings
    for key in LENGTHS:
        value = setting(recipe, key)
        if value is not None and _longest(value) > limit:
            raise UserError(f"{key} is {_longest(value):,} tokens and the teacher's limit is {limit:,}: lower it")


def _longest(value: Any) -> int:
    return value if isinstance(value, int) else max(value)


def _in_words(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-".join(f"{end:,}" for end in value)
