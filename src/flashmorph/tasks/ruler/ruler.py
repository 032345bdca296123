"""RULER's questions as prompts of at most an asked-for length."""

import random
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError
from flashmorph.tasks.encoded import encode
from flashmorph.tasks.prompt import Prompt
from flashmorph.tasks.ruler.forms import FORMS
from flashmorph.tasks.ruler.written import Material, Written
from flashmorph.tasks.turns import template_words
from flashmorph.tokens.special_tokens import before_text

_FIRST_TRY = 32
_CLOSE = 64


class Ruler:
    """Questions of every task in `FORMS`; the same seed, task, length and number always give the same one.

    As in RULER, prompt and answer together take at most the context length. The haystack's text comes from `documents`
    where RULER has Paul Graham's essays, and each question takes it from another position on. With `chat_template` a
    question is the user's message and the beginning of the answer the assistant's, as in RULER for such models.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seed: int, chat_template: bool = False
    ):
        """
        Raises:
            UserError: `chat_template`, and the tokenizer has none.
        """
        self._tokenizer = tokenizer
        self._start = [] if chat_template else before_text(tokenizer)
        self._words = template_words(tokenizer, 1) if chat_template else ["", " "]
        self._material = Material(documents)
        self._seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(FORMS)

    def has_depth(self, name: str) -> bool:
        """Whether the depth of what a task asks for can be chosen."""
        return FORMS[name].has_depth

    def prompt(self, name: str, length: int, number: int, depth: float | None) -> Prompt:
        """Question `number` of a task at a context length.

        Raises:
            UserError: the task does not fit into `length` tokens.
        """
        form = FORMS[name]
        room = length - form.answer_tokens

        def write(units: int) -> tuple[list[int], Written]:
            written = self._write(name, length, number, depth, units)
            before, between = self._words
            text = before + written.question + between + written.prefix
            return self._start + encode(self._tokenizer, text), written

        least, _ = write(form.least)
        if len(least) > room:
            needed = len(least) + form.answer_tokens
            raise UserError(f"{name} needs at least {needed} tokens; the context length is {length}")
        most = min(length, len(self._material.words)) if name == "cwe" else length
        units = _most_units(lambda units: len(write(units)[0]), room, form.least, len(least), most)
        ids, written = write(units)
        return Prompt(ids, form.answer_tokens, written.references, anywhere=True)

    def _write(self, name: str, length: int, number: int, depth: float | None, units: int) -> Written:
        form = FORMS[name]
        rng = random.Random(f"{self._seed} {name} {length} {number}")
        return form.write(rng, self._material, units, depth, **form.settings_at(length))


def _most_units(tokens: Callable[[int], int], room: int, least: int, needed: int, most: int) -> int:
    """The most haystack that takes `room` tokens, or a little less. `least` takes `needed` tokens, which fit.

    Tokens grow about linearly with the haystack, so each try corrects the one before: two or three are enough.
    """
    fits, too_long = least, most + 1
    guess = least + room // _FIRST_TRY
    while too_long - fits > 1:
        units = min(max(guess, fits + 1), too_long - 1)
        used = tokens(units)
        if used > room:
            too_long = units
        elif used >= room - room // _CLOSE:
            return units
        else:
            fits = units
        guess = least + (room - needed) * (units - least) // max(1, used - needed)
    return fits
