"""The retrieval questions of a recipe, by split."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from flashmorph.data.corpus import Corpus, Mixture, Pooled
from flashmorph.data.heldout import HeldOut, hold_out
from flashmorph.recipe.recipe import Recipe
from flashmorph.tasks import STYLES, Example, Haystack, Layout, make_example


def open_layout(
    recipe: Recipe,
    corpus: Pooled,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    chat_template: bool | None = None,
) -> Layout:
    """The layout of problems in the recipe's text of one split; `chat_template` defaults to that of a search.

    Raises:
        UserError: the corpus has no text in this split, or the tokenizer no template.
    """
    templated = recipe.chat_template if chat_template is None else chat_template
    repeated = recipe.data.haystack == "repeated"
    haystack = Haystack.repeated() if repeated else Haystack(corpus.pool(split, recipe.seed))
    return Layout(tokenizer, STYLES[recipe.style], haystack, templated)


def open_questions(
    recipe: Recipe,
    corpus: Pooled,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "test",
    number: int | None = None,
    length: int | None = None,
    chat_template: bool | None = None,
) -> dict[str, Sequence[Example]]:
    """The recipe's questions of one split, by task.

    Number, length and chat template default to the recipe's `evaluate` section.

    Args:
        recipe: Names tasks, style, seed and the section `evaluate`.
        corpus: The text that problems are laid out in.
        tokenizer: The teacher's.
        split: `train`, `validation`, `referee` or `test`; splits share neither text nor names.
        number: Questions of each task.
        length: Tokens of each example, answers included.
        chat_template: Whether questions are asked through the tokenizer's chat template.

    Returns:
        The examples of each task, by the task's name.
    """
    style, settings = STYLES[recipe.style], recipe.evaluate
    templated = settings.chat_template if chat_template is None else chat_template
    layout, length = open_layout(recipe, corpus, tokenizer, split, templated), length or settings.length
    return {
        name: [
            make_example(task, layout, style, split, length, recipe.seed, question)
            for question in range(number or settings.questions)
        ]
        for name, task in recipe.tasks.items()
    }


def held_out(recipe: Recipe, corpus: Corpus | Mixture, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The text that perplexity is measured on.

    Raises:
        UserError: the corpus has no text of the test split.
    """
    settings = recipe.evaluate
    long = settings.takes_long_documents
    return hold_out(corpus, tokenizer, "test", settings.length, settings.perplexity_tokens, recipe.seed, long)
