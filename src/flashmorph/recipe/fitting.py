"""A recipe fitted to its teacher: contexts that nobody asked for by name end where the teacher's do, and rows of a
distillation are longer than a window."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from flashmorph.errors import UserError
from flashmorph.hosts import configure, with_branches_to_train
from flashmorph.plan import FULL
from flashmorph.recipe.recipe import Recipe, setting, with_settings
from flashmorph.records import SettingValues

_ROWS_OF_WINDOWS = 3
LENGTHS = ("align.length", "select.search.length", "distill.length", "extend.length", "evaluate.length")


def fit(recipe: Recipe, config: PreTrainedConfig, keys: Sequence[str] = LENGTHS) -> tuple[Recipe, str]:
    """The recipe with every length that was not given (`Recipe.given`) within the teacher's limit, rows of `distill`
    longer than a window, and a line with what was changed; empty where nothing was. Tokens and batches stay.

    Raises:
        UserError: the teacher has no host with these settings.
    """
    limit = config.max_position_embeddings
    capped: SettingValues = {}
    for key in keys:
        value = setting(recipe, key)
        if value is not None and key not in recipe.given and _longest(value) > limit:
            capped[key] = min(value, limit) if isinstance(value, int) else tuple(min(end, limit) for end in value)
    changes = ", ".join(
        f"{key} {_in_words(setting(recipe, key))} -> {_in_words(value)}" for key, value in capped.items()
    )
    recipe = with_settings(recipe, capped) if capped else recipe
    notices = [f"the teacher's limit is {limit:,} tokens: {changes}"] if capped else []
    if "distill.length" in keys and (length := _beyond_windows(recipe, config)) != recipe.distill.length:
        before, recipe = recipe.distill.length, with_settings(recipe, {"distill.length": length})
        notices.append(f"rows are at least three times as long as the window: distill.length {before:,} -> {length:,}")
    return recipe, "; ".join(notices)


def _beyond_windows(recipe: Recipe, config: PreTrainedConfig) -> int:
    """The length of rows of `distill`, doubled until it is three times what its mixers compute exactly, if none of them
    is trained.

    A row no longer than a window has a KL of 0 with any plan: steps on it are noise, which Adam makes as large as any.
    A length that was given stays, as does one that the teacher's limit or the batch does not let grow beyond windows.
    """
    length, settings = recipe.distill.length, recipe.distill
    if "distill.length" in recipe.given:
        return length
    longest = min(config.max_position_embeddings, settings.batch_tokens)
    while not _differs(recipe, config, length // _ROWS_OF_WINDOWS + 1) and 2 * length <= longest:
        length *= 2
    return length if _differs(recipe, config, length) else settings.length


def require_beyond_windows(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse a distillation whose rows every plan computes exactly.

    Raises:
        UserError: names the setting; see also `configure`.
    """
    length = recipe.distill.length
    if not _differs(recipe, config, length):
        raise UserError(
            f"distill.length is {length:,} tokens, and rows of that length lie within the window: switched layers do "
            "what full ones do and nothing would be learned; make it a few times as long as the window"
        )


def _differs(recipe: Recipe, config: PreTrainedConfig, length: int) -> bool:
    """Whether some switched layer computes anything else than full attention in rows of `length` tokens: it is trained,
    or its last token no longer has all tokens before it."""
    host, own = configure(config, recipe.host)
    if with_branches_to_train(host):
        return True
    every = host.mixers[FULL].cache_bytes(own, length - 1)
    return any(mixer.cache_bytes(own, length - 1) < every for name, mixer in host.mixers.items() if name != FULL)


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
    return f"{value:,}" if isinstance(value, int) else "-".join(dict.fromkeys(f"{end:,}" for end in value))
