"""Lay a problem out in a haystack, as tokens of an exact length with the answers marked."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError
from flashmorph.tasks.haystack import Haystack
from flashmorph.tasks.problem import Problem
from flashmorph.tasks.prompt import Prompt
from flashmorph.tasks.style import Style

_MARGIN_TOKENS = 2


@dataclass(frozen=True)
class Example:
    """One row of a batch.

    `input_ids` and `is_answer` have the asked-for length; the last question's answer ends the row, so
    `input_ids[:prompt_tokens]` is what a model sees before it answers. A generated continuation is right when it
    starts with `answer + stop`.
    """

    input_ids: list[int]
    is_answer: list[bool]
    prompt_tokens: int
    answer: str
    stop: str

    @property
    def prompt(self) -> Prompt:
        """The last question, to be answered by generation."""
        answer_tokens = len(self.input_ids) - self.prompt_tokens + _MARGIN_TOKENS
        return Prompt(self.input_ids[: self.prompt_tokens], answer_tokens, (self.answer + self.stop,))


class Layout:
    """Fills examples with haystack lines so that each has exactly `length` tokens.

    Every piece is tokenised on its own and joined as tokens: the prompt's tokens are then a prefix of the whole row's
    with any tokeniser, and answers are marked exactly.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style, haystack: Haystack):
        self._tokenizer = tokenizer
        self._style = style
        self._haystack = haystack
        bos = tokenizer.bos_token_id
        self._start: list[int] = [int(bos)] if isinstance(bos, int) and tokenizer("").input_ids[:1] == [bos] else []

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` without special tokens."""
        return cast(list[int], self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def lay_out(
        self, problem: Problem, length: int, rng: random.Random, depths: Sequence[float] | None = None
    ) -> Example:
        """Hide the facts at `depths` (each between 0, the start, and 1; at random by default) and ask at the end.

        Raises:
            UserError: the facts and questions alone are longer than `length` tokens.
        """
        facts = [self.encode(fact) for fact in problem.facts]
        ids, marks, prompt_tokens = self._questions(problem)
        room = length - len(self._start) - sum(map(len, facts)) - len(ids)
        if room < 0:
            raise UserError(
                f"a task with {len(facts)} facts and {len(problem.questions)} questions needs at least "
                f"{length - room} tokens; the context length is {length}"
            )
        hay = self._fill(room, rng)
        context = self._hide(facts, hay, sorted(depths) if depths else sorted(rng.random() for _ in facts))
        before = self._start + context
        return Example(
            input_ids=before + ids,
            is_answer=[False] * len(before) + marks,
            prompt_tokens=len(before) + prompt_tokens,
            answer=problem.questions[-1][1],
            stop=self._style.stop,
        )

    def plain(self, length: int, rng: random.Random) -> Example:
        """`length` tokens of the haystack alone; every token but the first counts as an answer."""
        ids = self._start + [token for line in self._fill(length - len(self._start), rng) for token in line]
        return Example(ids, [False] + [True] * (length - 1), prompt_tokens=1, answer="", stop="")

    def _questions(self, problem: Problem) -> tuple[list[int], list[bool], int]:
        """Tokens of all questions, which of them are answers, and where the last answer begins."""
        ids: list[int] = []
        marks: list[bool] = []
        begin = 0
        for number, (prompt, answer) in enumerate(problem.questions):
            asked = self.encode((self._style.stop if number else "") + prompt)
            answered = self.encode(answer)
            ids += asked
            begin = len(ids)
            ids += answered
            marks += [False] * len(asked) + [True] * len(answered)
        return ids, marks, begin

    def _fill(self, room: int, rng: random.Random) -> list[list[int]]:
        """Tokenised lines of exactly `room` tokens in all; the first one is cut at its beginning."""
        hay: list[list[int]] = []
        size = 0
        lines = self._haystack.lines(rng)
        while size < room:
            line = self.encode(next(lines))
            hay.append(line)
            size += len(line)
        if size > room:
            surplus = size - room
            while surplus >= len(hay[0]):
                surplus -= len(hay.pop(0))
            hay[0] = hay[0][surplus:]
        return hay

    @staticmethod
    def _hide(facts: list[list[int]], hay: list[list[int]], depths: Sequence[float]) -> list[int]:
        """Put each fact before the first line that begins at or after its depth."""
        if len(depths) != len(facts):
            raise UserError(f"depths must name one place for each of the {len(facts)} facts; got {len(depths)}")
        room = sum(map(len, hay))
        waiting = list(zip(depths, facts, strict=True))
        context: list[int] = []
        seen = 0
        for line in hay:
            while waiting and waiting[0][0] * room <= seen:
                context += waiting.pop(0)[1]
            context += line
            seen += len(line)
        for _, fact in waiting:
            context += fact
        return context
