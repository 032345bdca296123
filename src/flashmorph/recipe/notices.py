"""What a user should know of a recipe before any stage, beside what is refused."""

from collections.abc import Collection

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flashmorph.data.corpus import Corpus, shares_of
from flashmorph.hosts import host_for
from flashmorph.recipe.recipe import Recipe, load_recipe, setting
from flashmorph.units import listed

_TRAINING = {"align", "distill", "extend"}


def notices(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, stages: Collection[str]
) -> list[str]:
    """A line each, beside `of_default`; `config` and `tokenizer` are the teacher's, `stages` those that will run.

    Raises:
        UserError: local text cannot be read, or no host takes the teacher.
    """
    lines = []
    if (host := host_for(config, recipe.host)).travelling:
        lines.append(
            f"{host.name}: heads may be switched one by one ({', '.join(host.mixers)}), so the hybrid is of our own "
            "type, which transformers alone serves; without --mixers and heads= it is a stock class"
        )
    if tokenizer and tokenizer.chat_template and _TRAINING & set(stages) and not _has_conversations(recipe):
        lines.append(_without_conversations(recipe))
    return lines


def of_default(recipe: Recipe) -> str:
    """Which groups of settings are those of `default`; nothing where the recipe leaves none out.

    It comes before a recipe is checked: what is refused may be a setting that the user's file does not have.
    """
    groups = listed(recipe.of_default)
    return groups and f"the recipe leaves out {groups}: taken from `default` (`flashmorph recipe default` prints it)"


def _has_conversations(recipe: Recipe) -> bool:
    """Whether some of the text is conversations, as far as that shows without the network.

    Of local text the first document is looked at. A streamed dataset may have them in a column that its settings do not
    name: of those only `default`'s own is known to be plain text.
    """
    return any(map(_is_of_conversations, (part for part, _ in shares_of(recipe.data.corpus))))


def _is_of_conversations(part: Corpus) -> bool:
    if part.is_chat:
        return True
    if part.paths() is None:
        return part.source != load_recipe("default").data.source
    first = next(part.every(), None)
    return first is not None and first.messages is not None


def _without_conversations(recipe: Recipe) -> str:
    asks = [f"--set {name}=true" for name in ("chat_template", "evaluate.chat_template") if not setting(recipe, name)]
    through = f"; {' '.join(asks)} asks questions through the template" if asks else ""
    return (
        "the teacher has a chat template and the text no conversations: a teacher that follows instructions may forget "
        f"how to answer. --recipe chat mixes conversations in{through}"
    )
