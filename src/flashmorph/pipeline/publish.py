"""The result of a run: the checkpoint of its last stage, with plan, results, recipe and card beside it."""

from pathlib import Path

from flashmorph.convert.save import replace_checkpoint
from flashmorph.convert.shards import require_whole
from flashmorph.files import atomic_path, write_json
from flashmorph.plan import Plan
from flashmorph.recipe.recipe import Recipe
from flashmorph.records import Figures


def publish(folder: Path, model: Path, teacher: Path, plan: Plan, results: Figures, recipe: Recipe, card: str) -> None:
    """Make `folder` itself the checkpoint of the stage in `model`, with plan, results, recipe and card beside it.

    An earlier result is replaced (`replace_checkpoint`) and stays in its stage's folder only. The new checkpoint is
    checked before anything is replaced.

    Args:
        folder: The run's folder.
        model: The folder of the stage, with the checkpoint in `model/model`.
        teacher: The teacher's folder, whose tokenizer, templates and generation settings are copied.
        plan: Saved as `plan.json`.
        results: Saved as `results.json`.
        recipe: Saved as `recipe.yaml`.
        card: The text of `README.md`.

    Raises:
        UserError: the checkpoint is incomplete, or `folder` cannot be written.
    """
    require_whole(model / "model")
    replace_checkpoint(folder, model / "model", teacher)
    plan.save(folder / "plan.json")
    write_json(folder / "results.json", results)
    for name, text in (("recipe.yaml", recipe.to_yaml()), ("README.md", card)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
