"""The wording of facts, links and questions; tasks have none of their own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """Templates over `{key}`, `{value}` and `{target}`.

    `answer` begins where the model takes over; `stop` is what must follow a complete answer, so that `48213` does not
    pass for `482139`. `value_digits` is the number of digits of a value. `turn` stands in a question between what a
    user asks and the beginning of the reply; where it is empty, the reply is the answer alone.
    """

    fact: str
    link: str
    question: str
    many_question: str
    answer: str
    separator: str
    stop: str
    value_digits: int
    turn: str = ""

    def split(self, question: str) -> tuple[str, str]:
        """The user's message, and the beginning of the reply."""
        if not self.turn:
            return question, ""
        asked, _, reply = question.partition(self.turn)
        return asked, reply


STYLES = {
    "lines": Style(
        fact="@ {key}:{value}\n",
        link="@ {key}: {target}\n",
        question="? {key}:",
        many_question="? {key}:",
        answer="{value}",
        separator=",",
        stop="\n",
        value_digits=6,
    ),
    "prose": Style(
        fact="The secret number of the {key} is {value}.\n",
        link="The secret number of the {key} is the same as the secret number of the {target}.\n",
        question="\nQuestion: What is the secret number of the {key}?\nAnswer: The secret number of the {key} is",
        many_question="\nQuestion: What are all the secret numbers of the {key}, in the order of the text?\n"
        "Answer: The secret numbers of the {key} are",
        answer=" {value}",
        separator=",",
        stop=".",
        value_digits=6,
        turn="\nAnswer: ",
    ),
}
