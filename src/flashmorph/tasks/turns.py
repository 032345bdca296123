"""The words around questions and answers: a running text's, or those of the tokenizer's chat template."""

from transformers import PreTrainedTokenizerBase

from flashmorph.errors import UserError, first_line
from flashmorph.surface.interrupts import template_limit
from flashmorph.tasks.style import Style

_ROLES = ("user", "assistant")


def plain_words(style: Style, questions: int) -> list[str]:
    """The text before each question and each reply, in turn `[2 * questions]`, in a text without a template."""
    return ["", style.turn] + [style.stop, style.turn] * (questions - 1)


def ends_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the token that ends a text also ends the user's turns in the chat template (`<|im_end|>`, `<|eot_id|>`).

    After text that is no conversation such a teacher does not expect it.
    """
    if not tokenizer.eos_token or not getattr(tokenizer, "chat_template", None):
        return False
    try:
        return str(tokenizer.eos_token) in template_words(tokenizer, 1)[1]
    except UserError:
        return False


@template_limit
def template_words(tokenizer: PreTrainedTokenizerBase, questions: int) -> list[str]:
    """The same in a conversation: questions are the user's messages, replies the assistant's.

    Raises:
        UserError: the tokenizer has no template, or one that does not put messages in as they are, or has no end.
    """
    marks = [f"flashmorph{number}message" for number in range(2 * questions)]
    messages = [{"role": _ROLES[number % 2], "content": mark} for number, mark in enumerate(marks)]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("chat_template asks through the teacher's chat template, and its tokenizer has none")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # A template is a program.
        raise UserError(f"the teacher's chat template refuses questions and answers: {first_line(error)}") from error
    words = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise UserError("the teacher's chat template does not hold every message once and as it is")
        words.append(before)
    return words
