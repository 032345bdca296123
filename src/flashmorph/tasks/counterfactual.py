"""Counterfactual pairs: a question, and the same text in which its answer is another one.

For causal interventions (HydraHead, arXiv 2606.20097, section 4.1): both texts have the same length, differ in the
facts alone, and end with the first one's answer.
"""

import random
import re
from dataclasses import dataclass, replace

from flashmorph.tasks.layout import Layout
from flashmorph.tasks.problem import Problem
from flashmorph.tasks.questions import TASKS, TaskSettings
from flashmorph.tasks.style import Style
from flashmorph.tasks.words import names

_TRIES = 16
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Pair:
    """`clean` and `changed` token ids of one length; at the positions `answers` stands the clean answer in both.

    `others` are the tokens of the changed answer, one for each of `answers`.
    """

    clean: list[int]
    changed: list[int]
    answers: list[int]
    others: list[int]


def make_pair(
    task: TaskSettings, layout: Layout, style: Style, split: str, length: int, seed: int, number: int
) -> Pair | None:
    """A pair of `task`, made from its number alone; None where no other value has as many tokens.

    Args:
        task: The task and its settings.
        layout: Lays problems out in a haystack.
        style: The wording of facts and questions.
        split: `train`, `validation`, `referee` or `test`: the names that are used.
        length: Tokens of each text.
        seed: With the others, fixes the pair.
        number: Of the pair.

    Raises:
        UserError: the task does not fit into `length`, or asks for more names than the split has.
    """
    rng = random.Random(f"{seed} {split} {task.model_dump_json()} {length} pair {number}")
    problem = TASKS[task.task](rng, style, names(split), **task.settings)
    state = rng.getstate()

    def laid_out(each: Problem):
        rng.setstate(state)
        return layout.lay_out(each, length, rng)

    clean = laid_out(problem)
    answers = [position for position, is_answer in enumerate(clean.is_answer) if is_answer]
    values = random.Random(f"{seed} {split} {number} other values")
    for _ in range(_TRIES):
        other = _with_other_values(problem, values)
        changed = laid_out(replace(problem, facts=other.facts))
        answered = laid_out(other)
        if changed.is_answer == clean.is_answer == answered.is_answer and _alike_outside(clean, changed, problem):
            return Pair(
                clean.input_ids, changed.input_ids, answers, [answered.input_ids[position] for position in answers]
            )
    return None


def _with_other_values(problem: Problem, rng: random.Random) -> Problem:
    """Every value that is answered is another number of as many digits, in facts and answers."""
    found = dict.fromkeys(value for _, answer in problem.questions for value in _NUMBER.findall(answer))
    others = {value: _other(value, rng) for value in found}

    def change(text: str) -> str:
        return _NUMBER.sub(lambda match: others.get(match[0], match[0]), text)

    questions = tuple((question, change(answer)) for question, answer in problem.questions)
    return replace(problem, facts=tuple(map(change, problem.facts)), questions=questions)


def _other(value: str, rng: random.Random) -> str:
    """A number of as many digits, with another first one: the first token of an answer is the one that counts most."""
    first = rng.choice([digit for digit in "123456789" if digit != value[0]])
    return first + "".join(rng.choice("0123456789") for _ in value[1:])


def _alike_outside(clean, changed, problem: Problem) -> bool:
    """Whether two texts differ in no more tokens than their facts can have."""
    pairs = zip(clean.input_ids, changed.input_ids, strict=True)
    return 0 < sum(one != other for one, other in pairs) <= sum(map(len, problem.facts))
