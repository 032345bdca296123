"""Before any stage: whether the text is enough for all of them, and whether every task fits where it is asked."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flashmorph.data.corpus import no_text, shares_of
from flashmorph.data.documents import require_words
from flashmorph.data.supply import measure
from flashmorph.errors import UserError
from flashmorph.hosts import configure, with_branches_to_train
from flashmorph.recipe.fitting import require_beyond_windows
from flashmorph.recipe.questions import open_layout
from flashmorph.recipe.recipe import Recipe
from flashmorph.selection import STRATEGIES
from flashmorph.stages import TrainSettings
from flashmorph.tasks import SPLITS, STYLES, make_example
from flashmorph.tokens.special_tokens import before_text

COMPARE = "compare"
_DRAWS = 4
_SAFE = 0.9
"""The share of the tokens that there probably are which a message proposes to train on."""
_CHEAP_TOKENS = 1_024


def preflight(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, stages: Collection[str]
) -> None:
    """Refuse what a later one of these stages would find out; `config` is the teacher's.

    Text is looked at where it is on this machine; what is streamed is not counted.

    Raises:
        UserError: a split has no text, a stage would repeat the text too often, or a task does not fit.
    """
    if not with_branches_to_train(configure(config, recipe.host)[0]):
        stages = [stage for stage in stages if stage != "align"]
    if "distill" in stages or "select" in stages and STRATEGIES[recipe.select.strategy].needs_training:
        require_beyond_windows(recipe, config)
    check_tasks(recipe, tokenizer, stages, config.max_position_embeddings)
    check_text(recipe, tokenizer, stages)
    _check_long_documents(recipe, tokenizer, stages)


def reach_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the first document of every dataset of the hub.

    Raises:
        UserError: it cannot be reached, has nothing to read, or see `require_words`.
    """
    for part, _ in shares_of(recipe.data.corpus):
        if part.paths() is None:
            if not (document := next(part.every(), None)):
                raise UserError(f"{part.source} has no text in its first documents")
            require_words(tokenizer, part, document)


def check_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stages: Collection[str]) -> None:
    """Refuse too little text.

    Raises:
        UserError: names the splits, or all stages that it is too little for.
    """
    passes, splits, trained = recipe.data.max_passes, _splits(recipe, stages), _trained(recipe, stages)
    short: list[_Short] = []
    for part, share in shares_of(recipe.data.corpus):
        if part.paths() is None:
            continue
        needed = {settings.stage: round(share * _text_tokens(settings)) for settings in trained}
        enough = max(needed.values(), default=0) / passes if passes else 0
        supply = measure(part, tokenizer, enough, splits)
        if supply.whole and (missing := [split for split in SPLITS if split in splits - supply.splits]):
            raise no_text(part, *missing)
        if passes and (of := {stage: tokens for stage, tokens in needed.items() if supply.tokens * passes < tokens}):
            short.append(_Short(part.source, supply.likely, of))
    if passes and short:
        raise UserError(_too_small(short, trained, passes))


class _Short(NamedTuple):
    """A source that has `tokens` of the split `train`, too few for stages that each need so many of it."""

    source: str
    tokens: int
    needed: dict[str, int]


def _too_small(short: Sequence[_Short], trained: Sequence[TrainSettings], passes: int) -> str:
    """One sentence on all stages, with the most tokens that each of them may have."""
    facts = [
        f"{each.source} is too small: it has about {each.tokens:,} tokens for the split 'train', read {passes} times "
        f"at most, and {', '.join(f'{stage} needs {tokens:,}' for stage, tokens in each.needed.items())}"
        for each in short
    ]
    fewer = []
    for settings in trained:
        shares = [each.tokens * passes / each.needed[settings.stage] for each in short if settings.stage in each.needed]
        if shares:
            fewer.append((settings.stage, int(_SAFE * min(shares) * settings.steps) * settings.batch_tokens))
    there = all(tokens for _, tokens in fewer)
    remedy = (
        f"fewer tokens ({' '.join(f'--set {stage}.tokens={tokens}' for stage, tokens in fewer)}), " if there else ""
    )
    return f"{'; '.join(facts)}; give more --data, {remedy}or --allow-repeat"


def _check_long_documents(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stages: Collection[str]) -> None:
    """Refuse stages that only take documents which fill a row, where no local file has one."""
    inserted = len(before_text(tokenizer)) + (tokenizer.eos_token_id is not None)
    for section, split, length, otherwise in _long(recipe, stages):
        room = length - inserted
        parts = [part for part, _ in shares_of(recipe.data.corpus) if part.paths() is not None]
        for part in parts:
            documents = (document for document in part.every() if document.split == split)
            # What a template adds to a conversation is not known before it is worded: those pass.
            if not any(each.messages is not None or _has_tokens(tokenizer, each.text, room) for each in documents):
                raise UserError(
                    f"{section}.documents=long: {part.source} has no document of {length:,} tokens or more in the "
                    f"split {split!r}: give longer documents, a smaller {section}.length, or "
                    f"{section}.documents={otherwise}"
                )


def _long(recipe: Recipe, stages: Collection[str]) -> Iterator[tuple[str, str, int, str]]:
    """(section, split, length, value that takes any document) where only long ones are wanted."""
    if recipe.extend and "extend" in stages and recipe.extend.takes_long_documents:
        yield "extend", "train", recipe.extend.length, "joined"
    if "evaluate" in stages and recipe.evaluate.takes_long_documents:
        yield "evaluate", "test", recipe.evaluate.length, "any"


def _has_tokens(tokenizer: PreTrainedTokenizerBase, text: str, least: int) -> bool:
    """Whether a text has so many tokens; a token is at least one byte, so most texts need no tokenizer."""
    if len(text.encode(errors="replace")) < least:
        return False
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) >= least


def check_tasks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stages: Collection[str], limit: int) -> None:
    """Make a few questions of every task in the shortest context of each split, in a haystack that costs nothing.

    Raises:
        UserError: names the task, the setting and what is needed.
    """
    shortest: dict[str, tuple[int, str]] = {}
    for split, setting, length in _contexts(recipe, stages):
        shortest[split] = min(shortest.get(split, (length, setting)), (length, setting))
    data = recipe.data.model_copy(update={"haystack": "repeated"})
    cheap = recipe.model_copy(update={"data": data})
    for split, (length, setting) in shortest.items():
        layout = open_layout(cheap, data.corpus, tokenizer, split)
        for name, task in recipe.tasks.items():
            try:
                for number in range(_DRAWS):
                    # What fits into less fits into all; only what does not is worth a long haystack.
                    for tokens in sorted({min(length, _CHEAP_TOKENS), length}):
                        try:
                            make_example(task, layout, STYLES[recipe.style], split, tokens, recipe.seed, number)
                            break
                        except UserError:
                            if tokens == length:
                                raise
            except UserError as error:
                why = ", the teacher's limit" if length == limit else ""
                raise UserError(f"task {name!r} in the split {split!r} ({setting}={length}{why}): {error}") from error


def _trained(recipe: Recipe, stages: Collection[str]) -> list[TrainSettings]:
    """The settings of the stages that train on rows of text."""
    return [
        settings for settings in (recipe.align, recipe.distill, recipe.extend) if settings and settings.stage in stages
    ]


def _text_tokens(settings: TrainSettings) -> int:
    return (settings.rows - settings.questions) * settings.length


def _searches(recipe: Recipe, stages: Collection[str]) -> bool:
    return COMPARE in stages or "select" in stages and STRATEGIES[recipe.select.strategy].searches


def _splits(recipe: Recipe, stages: Collection[str]) -> set[str]:
    """The splits of the text that are read."""
    hidden = recipe.data.haystack == "text"
    splits = {"train"} if _trained(recipe, stages) or hidden else set()
    if _searches(recipe, stages) and (hidden or STRATEGIES[recipe.select.strategy].needs_text):
        splits.add("validation")
    if "evaluate" in stages:
        splits.add("test")
    return splits | ({"referee"} if COMPARE in stages else set())


def _contexts(recipe: Recipe, stages: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """(split, setting, length) of every context that a task is asked in."""
    search = recipe.select.search
    if _searches(recipe, stages):
        if COMPARE in stages or STRATEGIES[recipe.select.strategy].gradient_loss:
            yield "train", "select.search.length", search.shortest
        yield "validation", "select.search.length", search.longest
    for settings in _trained(recipe, stages):
        if settings.questions:
            yield "train", f"{settings.stage}.length", settings.length
    if "evaluate" in stages:
        yield "test", "evaluate.length", recipe.evaluate.length
    if COMPARE in stages:
        yield "referee", "select.search.length", search.longest
