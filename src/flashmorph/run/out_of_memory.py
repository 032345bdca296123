"""The message when a device runs out of memory: one sentence with the setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

from flashmorph import distributed
from flashmorph.errors import UserError, is_out_of_memory
from flashmorph.recipe.recipe import Recipe


@contextmanager
def within_memory(stage: str, recipe: Recipe) -> Iterator[None]:
    """Name the setting to lower if `stage` needs more memory than the device has.

    Raises:
        UserError: it does; whatever checkpoint there is stays.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{stage} ran out of memory: {_remedy(stage, recipe)}; what is done is kept") from error


def _remedy(stage: str, recipe: Recipe) -> str:
    asked = _tokens_at_once(stage, recipe)
    if asked is None:
        return "the model must fit as a whole, run this stage with --device cpu"
    setting, tokens, row = asked
    if tokens > row:
        return f"lower {setting}, now {tokens}: --set {setting}={max(row, tokens // 2 // row * row)}"
    keeps = getattr(getattr(recipe, stage, None), "activation_checkpointing", True) is not True
    others = [f"--set {stage}.activation_checkpointing=true"] if keeps else []
    if stage == "align" and recipe.calibration_rows > 1:  # Branches start from so many rows at once.
        others.append("--set calibration_rows=1")
    if stage not in ("teacher", "evaluate") and distributed.count() > 1 and recipe.shard is not True:
        others.append("--set shard=true")
    others.append("shorter rows")
    if stage in ("align", "distill", "extend") and distributed.count() == 1:
        others.append("several GPUs (torchrun)")
    return f"{setting} is one row already, {row:,} tokens: {' or '.join(others)}"


def _tokens_at_once(stage: str, recipe: Recipe) -> tuple[str, int, int] | None:
    """The setting, how many tokens run at once on one device by it, and the fewest that can."""
    trained = {"align": recipe.align, "logits": recipe.distill, "distill": recipe.distill, "extend": recipe.extend}
    if settings := trained.get(stage):
        rows = settings.division(distributed.count()).rows
        return f"{settings.stage}.micro_batch_tokens", rows * settings.length, settings.length
    if stage in ("signal", "select", "curve"):
        search = recipe.select.search
        return "select.search.micro_batch_tokens", search.rows_at_once * search.longest, search.longest
    if stage in ("teacher", "evaluate"):
        row = recipe.evaluate.length if stage == "evaluate" else recipe.select.search.longest
        tokens = recipe.evaluate.tokens_at_once
        return "evaluate.batch_tokens", max(tokens, row), row
    return None
