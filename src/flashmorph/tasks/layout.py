"""Lay a problem out in a haystack, as tokens of an exact length with the answers marked."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError
from flashmorph.tasks.encoded import EncodedText, encode
from flashmorph.tasks.hay import Hay, LineSizes, Piece, hide
from flashmorph.tasks.haystack import Haystack
from flashmorph.tasks.problem import Problem
from flashmorph.tasks.prompt import Prompt
from flashmorph.tasks.style import Style
from flashmorph.tasks.turns import plain_words, template_words
from flashmorph.tokens.continuation import continuation
from flashmorph.tokens.special_tokens import before_text
from flashmorph.units import counted

_MARGIN_TOKENS = 2
_TRIES = 16


@dataclass(frozen=True)
class Example:
    """One row of a batch.

    `input_ids` and `is_answer` have the asked-for length; the last question's answer ends the row, so
    `input_ids[:prompt_tokens]` is what a model sees before it answers. A generated continuation is right when it
    starts with `reading + stop`, or ends after `reading`: what the answer's tokens read like behind the prompt, which
    is more than the `answer` where the tokenizer joins its beginning with the end of the question.
    """

    input_ids: list[int]
    is_answer: list[bool]
    prompt_tokens: int
    answer: str
    stop: str
    reading: str = ""

    @property
    def prompt(self) -> Prompt:
        """The last question, to be answered by generation."""
        answer_tokens = len(self.input_ids) - self.prompt_tokens + _MARGIN_TOKENS
        reference = self.reading or self.answer
        return Prompt(self.input_ids[: self.prompt_tokens], answer_tokens, (reference,), stop=self.stop)


class Layout:
    """Fills examples with haystack lines so that each has exactly `length` tokens.

    The whole text is tokenised in one go, so that every token is the one that it has in such a text with any tokenizer.
    In front stands what the tokenizer puts before a text; what is too much is cut off the beginning of the haystack.

    With `chat_template` the context and the questions are the user's messages under the tokenizer's template, and the
    answers the assistant's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, style: Style, haystack: Haystack, chat_template: bool = False
    ):
        """
        Raises:
            UserError: `chat_template`, and the tokenizer has none.
        """
        self._tokenizer, self._style, self._haystack, self._chat = tokenizer, style, haystack, chat_template
        self._start = before_text(tokenizer)
        self._sizes = LineSizes(tokenizer)
        self._stop = self._stop_as_read()
        self._words(1)

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` without special tokens."""
        return encode(self._tokenizer, text)

    def lay_out(
        self, problem: Problem, length: int, rng: random.Random, depths: Sequence[float] | None = None
    ) -> Example:
        """Hide the facts at `depths` (each between 0, the start, and 1; at random by default) and ask at the end.

        Raises:
            UserError: the facts and questions alone are longer than `length` tokens.
        """
        opening, *asked = self._asked(problem)
        start = [] if self._chat else self._start
        facts = [Piece(fact, "fixed") for fact in problem.facts]
        bare = _Row(self._tokenizer, start, [opening, *facts, *asked])
        room = length - len(bare.ids)
        if room < 0:
            raise UserError(
                f"a task with {counted(len(facts), 'fact')} and {counted(len(problem.questions), 'question')} needs at "
                f"least {length - room} tokens; the context length is {length}"
            )
        hay = Hay(self._sizes, self._haystack, rng, length)
        hay.last(room)
        given = sorted(depths) if depths else sorted(rng.random() for _ in facts)

        def pieces(lines: list[str], sizes: list[int]) -> list[Piece]:
            return [opening, *hide(lines, sizes, problem.facts, given), *asked]

        row = self._filled(hay, length, room, start, pieces) or bare.with_filler(self._filler(hay, room))
        return self._example(row, problem.questions[-1][1])

    def plain(self, length: int, rng: random.Random) -> Example:
        """`length` tokens of the haystack alone; every token but the first counts as an answer."""
        room = length - len(self._start)
        hay = Hay(self._sizes, self._haystack, rng, length)
        row = self._filled(hay, length, room, self._start, lambda lines, _: [Piece("".join(lines), "hay")])
        assert row
        return Example(row.ids, [False] + [True] * (length - 1), prompt_tokens=1, answer="", stop="")

    def _asked(self, problem: Problem) -> list[Piece]:
        """The text before the context, and the questions with their answers and the words around them."""
        opening, *words = self._words(len(problem.questions))
        pieces = [Piece(opening, "fixed")]
        for number, (question, answer) in enumerate(problem.questions):
            user, reply = self._style.split(question)
            if number:
                pieces.append(Piece(words[2 * number - 1], "fixed"))
            pieces += [Piece(user + words[2 * number] + reply, "fixed"), Piece(answer, "answer")]
        return pieces

    def _words(self, questions: int) -> list[str]:
        if not self._chat:
            return plain_words(self._style, questions)
        first, turn, *others = template_words(self._tokenizer, questions)
        stop = self._style.stop.rstrip()
        return [first, turn, *(word if number % 2 else stop + word for number, word in enumerate(others))]

    def _filled(
        self,
        hay: Hay,
        length: int,
        room: int,
        start: list[int],
        pieces: Callable[[list[str], list[int]], list[Piece]],
    ) -> "_Row | None":
        """The row of exactly `length` tokens; None where its text has more even without the haystack's.

        Lines are measured one by one, and in a text they may take a little less: then more are taken.

        Raises:
            UserError: the haystack has nothing that the tokenizer knows.
        """
        wanted = room
        for attempt in range(_TRIES):
            row = _Row(self._tokenizer, start, pieces(*hay.last(wanted)))
            if (short := length - len(row.ids)) <= 0:
                return row if row.cut(-short) else None
            wanted += short << attempt
        raise UserError("the tokenizer has no tokens for the text that facts are to be hidden in")

    def _filler(self, hay: Hay, room: int) -> list[int]:
        """The last `room` tokens of the haystack, where there is room for hardly more than facts and questions."""
        lines, _ = hay.last(room)
        return self.encode("".join(lines))[-room:] if room else []

    def _example(self, row: "_Row", answer: str) -> Example:
        marks = [False] * len(row.ids)
        for begin, end in row.answers:
            marks[begin:end] = [True] * (end - begin)
        prompt_tokens = row.answers[-1][0]
        reading = continuation(self._tokenizer, row.ids[:prompt_tokens], row.ids[prompt_tokens:])
        return Example(row.ids, marks, prompt_tokens, answer, self._stop, reading)

    def _stop_as_read(self) -> str:
        """The style's `stop` as decoded after an answer: some tokenizers make a space of a line end."""
        answer, stop = self._style.answer.format(value="1"), self._style.stop

        def read(text: str) -> str:
            return continuation(self._tokenizer, [], self.encode(text))

        before = read(answer)
        behind, further = (read(text).removeprefix(before) for text in (answer + stop, answer + stop + "a"))
        return behind or further.removesuffix("a") or stop


class _Row:
    """The tokens `ids` of a text of pieces, and from which to which the answers go; the first piece is the opening."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: list[int], pieces: Sequence[Piece]):
        self._text = EncodedText(tokenizer, "".join(text for text, _ in pieces))
        self._start = len(start)
        self._spans: list[tuple[str, int, int]] = []
        end = 0
        for text, kind in pieces:
            self._spans.append((kind, end, end := end + len(text)))
        self.ids = start + self._text.ids
        found = [self._text.reaching_into(begin, end) for kind, begin, end in self._spans if kind == "answer"]
        self.answers = [(begin + self._start, end + self._start) for begin, end in found]

    def cut(self, surplus: int) -> bool:
        """Take out the first `surplus` tokens that are of the haystack alone; False where there are fewer."""
        out: list[int] = []
        for kind, begin, end in self._spans:
            if kind == "hay" and len(out) < surplus:
                first, last = self._text.within(begin, end)
                out += range(self._start + first, self._start + last)
        if len(out) < surplus:
            return False
        gone = set(out[:surplus])
        self.ids = [token for index, token in enumerate(self.ids) if index not in gone]
        self.answers = [(begin - surplus, end - surplus) for begin, end in self.answers]
        return True

    def with_filler(self, filler: list[int]) -> "_Row":
        """This row with tokens of text before its facts."""
        _, _, end = self._spans[0]
        token, clean = self._text.at(end)
        index = self._start + token + (not clean)
        self.ids[index:index] = filler
        self.answers = [(begin + len(filler), end + len(filler)) for begin, end in self.answers]
        return self
