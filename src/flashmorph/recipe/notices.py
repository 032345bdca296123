"""What a user should know of a recipe before any stage, beside what is refused."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from flashmorph.recipe.recipe import Recipe


def notices(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, stages: Collection[str]) -> list[str]:
    """A line each; `tokenizer` is the teacher's, `stages` those that will run.

    Raises:
        UserError: local text cannot be read.
    """
    found = [of_default(recipe)] if recipe.of_default else []
    return found


def of_default(recipe: Recipe) -> str:
    """Which groups of settings are those of `default`; nothing where the recipe leaves none out."""
    *most, last = recipe.of_default or ("",)
    groups = " and ".join(filter(None, (", ".join(most), last)))
    return groups and f"the recipe leaves out {groups}: taken from `default` (`flashmorph recipe default` prints it)"
