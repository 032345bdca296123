"""The result of a run: the checkpoint of its last stage, with plan, results, recipe and card beside it."""

from pathlib import Path
from typing import Any

from flashmorph.convert.save import replace_checkpoint
from flashmorph.convert.shards import require_whole
from flashmorph.files import atomic_path, write_json
from flashmorph.plan import Plan
from flashmorph.recipe.recipe import Recipe


def publish(
    folder: Path, model: Path, teacher: Path, plan: Plan, results: dict[str, Any], recipe: Recipe, card: str
) -> None:
    """Make `folder` itself the checkpoint of the stage in `model`, with plan, results, recipe and card beside it.

    What an earlier run published stays in its stage's folder, and nowhere else: see `replace_checkpoint`. The
    checkpoint is opened before anything is replaced.

    Raises:
        UserError: the checkpoint is not whole, or the place cannot be written.
    """
    require_whole(model / "model")
    replace_checkpoint(folder, model / "model", teacher)
    plan.save(folder / "plan.json")
    write_json(folder / "results.json", results)
    for name, text in (("recipe.yaml", recipe.to_yaml()), ("README.md", card)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
