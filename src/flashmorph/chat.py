"""Conversations as text: found in a row, put into words by the teacher's chat template, the replies marked."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from flashmorph.interrupts import time_limit

CHAT_COLUMNS = ("messages", "conversations")
"""Where a row's conversation is looked for, in this order."""
_MARKS_REPLIES = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_SECONDS = 20
"""Of computing, for one conversation: a template is a program, and it may have no end."""
_REPLY = "assistant"
_ROLES = {
    "human": "user",
    "gpt": _REPLY,
    "chatgpt": _REPLY,
    "bot": _REPLY,
    "observation": "tool",
    "function_response": "tool",
}
"""What ShareGPT's rows call their speakers."""

Message = dict[str, Any]


class Unfit(ValueError):
    """A conversation that the template does not put into words, or whose replies cannot be found in them."""


def messages_in(value: Any) -> list[Message] | None:
    """The conversation that `value` holds, as `role` and `content`; None if it is none.

    Rows in the form of ShareGPT (`from`, `value`) are read as well.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    messages = []
    for message in value:
        if "from" in message and "value" in message:
            message = {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if "role" not in message:
            return None
        messages.append({name: part for name, part in message.items() if part is not None})
    return messages


def spoken(messages: list[Message]) -> str:
    """What is said in a conversation, without who says it."""
    return "\n\n".join(text for message in messages if isinstance(text := message.get("content"), str))


@time_limit(
    _TEMPLATE_SECONDS,
    f"the teacher's chat template takes more than {_TEMPLATE_SECONDS} seconds for one conversation: mend it (does it "
    "come to an end?), or train on text without conversations",
)
def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], replies_only: bool
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation under the tokenizer's chat template, and which of them are learnt.

    With `replies_only` these are the replies' and what ends them. Some templates mark them (`{% generation %}`). For
    the others, a reply begins where the conversation before it, put into words with an invitation to reply, ends; it
    ends with the conversation up to it, or, where the template words earlier replies in another way than the last,
    with the first special token.

    Raises:
        Unfit: the template refuses the conversation, or a reply cannot be found.
        UserError: the template does not come to an end.
    """
    try:
        if replies_only and not _MARKS_REPLIES.search(tokenizer.get_chat_template()):
            return _find_replies(tokenizer, messages)
        found: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=replies_only
        )
        ids = found["input_ids"]
        return ids, [bool(mark) for mark in found["assistant_masks"]] if replies_only else [True] * len(ids)
    except Unfit:
        raise
    except Exception as error:  # A template is a program, and rows are what they are.
        raise Unfit((str(error).splitlines() or [type(error).__name__])[0]) from error


def _find_replies(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[list[int], list[bool]]:
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    special = set(tokenizer.all_special_ids)
    learnt = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != _REPLY:
            continue
        before = str(tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True))
        upto = str(tokenizer.apply_chat_template(messages[: number + 1], tokenize=False))
        if not whole.startswith(before):
            raise Unfit("the template words the beginning of a conversation in another way than the whole")
        places = [place for place, begin in enumerate(begins) if begin >= len(before)]
        if whole.startswith(upto):
            places = [place for place in places if begins[place] < len(upto)]
        else:
            last = next((place for place in places if ids[place] in special), None)
            if last is None:
                raise Unfit("the end of a reply cannot be told from what follows it")
            places = [place for place in places if place <= last]
        for place in places:
            learnt[place] = True
    return ids, learnt
