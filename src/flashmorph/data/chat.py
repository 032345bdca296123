"""Conversations as text: found in a row, put into words by the teacher's chat template, the replies marked."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from flashmorph.errors import first_line
from flashmorph.surface.interrupts import template_limit

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that may hold a conversation, in order of preference."""
TOOLS_COLUMN = "tools"
"""The column of the tools that a conversation may call."""
NO_REPLY = "no message is a reply"
"""The beginning of the reason of `Unfit` if a conversation has no target."""
_OTHERWISE = "the template words the beginning of a conversation in another way than the whole"
_MARKS_REPLIES = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REPLY = "assistant"
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES = {
    "human": "user",
    "gpt": _REPLY,
    "chatgpt": _REPLY,
    "bot": _REPLY,
    "observation": "tool",
    "function_response": "tool",
}
"""Roles by other names of speakers, ShareGPT's for the most part."""
_KNOWN_ROLES = {"system", "developer", "user", _REPLY, "tool", "function"}

Message = dict[str, Any]


class Unfit(ValueError):
    """A conversation that the template does not put into words, or whose replies cannot be found in them."""


def messages_in(value: Any, in_json: bool = False) -> list[Message] | None:
    """The conversation that `value` holds, as `role` and `content`; None if it is none.

    Rows in the form of ShareGPT (`from`, `value`) are read as well, and with `in_json` conversations that are written
    as JSON. What is null counts as not there: columnar files have nulls wherever another row has something.
    """
    value = without_nulls(_from_json(value) if in_json else value)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    messages = []
    for message in value:
        if "from" in message and "value" in message:
            message = {"role": str(message["from"]), "content": message["value"]}
        if "role" not in message:
            return None
        messages.append({**message, "role": _role(message["role"])})
    return messages


def _role(name: Any) -> Any:
    """A role in the words of templates, which know it in lower case; one that is not known stays as it is."""
    if not isinstance(name, str):
        return name
    known = name.strip().lower()
    return _ROLES.get(known, known if known in _KNOWN_ROLES else name)


def tools_in(value: Any) -> Any:
    """The tools that `value` holds, as a list, itself or each in JSON; None if there are none."""
    value = _from_json(value)
    if isinstance(value, list):
        return without_nulls([_from_json(tool) for tool in value])
    return None if value in ("", "null") else value


def without_nulls(value: Any) -> Any:
    """`value` without the entries of dictionaries, however deep, that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def spoken(messages: list[Message]) -> str:
    """The messages and tool calls of a conversation, without their roles."""
    return "\n\n".join(part for message in messages for part in _spoken_parts(message))


@template_limit
def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    replies_only: bool,
    tools: Any = None,
    prompt: int = 0,
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation under the tokenizer's chat template, and which of them are targets of the loss.

    They are those of `apply_chat_template(messages, tools=tools)`, where the template takes the messages as they are;
    see `_as_taken`. With `replies_only` the replies and their end tokens are targets. Some templates mark them
    (`{% generation %}`). For the others, a reply begins where the conversation before it, put into words with an
    invitation to reply, ends; it ends with the conversation up to it, or, where the template words earlier replies in
    another way than the last, with the first special token. Replies among the first `prompt` messages are no targets.

    Raises:
        Unfit: the template refuses the conversation, there is more than text in it, or a reply cannot be found.
        UserError: the template does not come to an end.
    """
    try:
        _check(messages, tools)
        template = tokenizer.get_chat_template(tools=tools)
        messages = _as_taken(messages, lambda each: _worded(tokenizer, each, tools))
        if replies_only and not _MARKS_REPLIES.search(template):
            ids, targets = _find_replies(tokenizer, messages, tools, prompt)
        else:
            encoded: Any = tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=replies_only
            )
            ids = encoded["input_ids"]
            targets = [bool(mark) for mark in encoded["assistant_masks"]] if replies_only else [True] * len(ids)
            if replies_only and prompt:
                after = _begins_after(tokenizer, messages, tools, prompt)
                targets = [target and late for target, late in zip(targets, after, strict=True)]
    except Unfit:
        raise
    except Exception as error:  # A template is a program, and rows are what they are.
        raise Unfit(first_line(error)) from error
    if not any(targets):
        roles = ", ".join(repr(role) for role in dict.fromkeys(message["role"] for message in messages))
        raise Unfit(f"{NO_REPLY} with tokens of its own: replies are those of {_REPLY!r}, and the roles are {roles}")
    return ids, targets


def _check(messages: list[Message], tools: Any) -> None:
    """Refuse what no template of a text model words."""
    if not messages:
        raise Unfit("there is no message in it")
    for part in (part for message in messages for part in _parts(message)):
        if _text_of(part) is None:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unfit(f"a part of its content is {kind!r} and not text")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unfit(f"{TOOLS_COLUMN!r} holds neither a list of tools nor one in JSON")


def _as_taken(messages: list[Message], worded: Callable[[list[Message]], str]) -> list[Message]:
    """The messages in the form that the template takes.

    Content in a list of parts goes as it is to a template that words the parts, and to others as one string. Where a
    template fails on content that is not there, that is an empty string.

    Raises:
        Unfit: the template leaves out what tools are called: without those a reply would be empty.
    """
    called = [name for message in messages for name in _called(message)]
    if not called and all(isinstance(message.get("content"), str) for message in messages):
        return messages
    try:
        text = worded(messages)
        takes_parts = all(_shows_parts(text, message) for message in messages)
    except Exception:
        takes_parts = False
    if not takes_parts:
        messages = [{**message, "content": _joined(message)} for message in messages]
        text = worded(messages)
    if not all(_shows(text, name) for name in called):
        raise Unfit("the template has no words for the tools that it calls")
    return messages


def _worded(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, invite: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=invite))


def _spoken_parts(message: Message) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    yield from (text for part in _parts(message) if (text := _text_of(part)))
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], sort_keys=True, ensure_ascii=False, default=str)


def _parts(message: Message) -> list[Any]:
    """The parts of a content that is a list."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def _text_of(part: Any) -> str | None:
    """The text of a part; None if it is something else."""
    if isinstance(part, dict):
        part = part.get("text", "") if part.get("type") in _TEXT_PARTS else "type" not in part and part.get("text")
    return part if isinstance(part, str) else None


def _called(message: Message) -> list[str]:
    """The names of the tools that a message calls."""
    calls = message.get("tool_calls")
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)] if calls else []
    return [function["name"] for function in functions if isinstance(function, dict) and "name" in function]


def _joined(message: Message) -> Any:
    """The content as one string, whatever else it is as it is."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(_text_of(part) or "" for part in content)
    return "" if content is None else content


def _shows_parts(text: str, message: Message) -> bool:
    """Whether the parts of a content that is a list are worded in `text`, and not the list as Python writes it."""
    parts = _parts(message)
    return not parts or str(parts) not in text and all(_shows(text, _text_of(part) or "") for part in parts)


def _shows(text: str, part: str) -> bool:
    """Whether `text` contains the text of a part, as it is or as JSON."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _from_json(value: Any) -> Any:
    """The content of a string that begins as a list or an object in JSON; every other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _with_begins(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a worded conversation, and the position in it at which each begins."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]


def _begins_after(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, prompt: int
) -> Iterator[bool]:
    """Whether each token of a conversation begins after its first `prompt` messages."""
    whole = _worded(tokenizer, messages, tools)
    before = _worded(tokenizer, messages[:prompt], tools, invite=messages[prompt]["role"] == _REPLY)
    if not whole.startswith(before):
        raise Unfit(_OTHERWISE)
    return (begin >= len(before) for begin in _with_begins(tokenizer, whole)[1])


def _find_replies(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, prompt: int
) -> tuple[list[int], list[bool]]:
    whole = _worded(tokenizer, messages, tools)
    ids, begins = _with_begins(tokenizer, whole)
    special = set(tokenizer.all_special_ids)
    targets = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != _REPLY or number < prompt:
            continue
        if not number:
            raise Unfit("it begins with a reply, and the template cannot invite to one before there is a message")
        before = _worded(tokenizer, messages[:number], tools, invite=True)
        upto = _worded(tokenizer, messages[: number + 1], tools)
        if not whole.startswith(before):
            raise Unfit(_OTHERWISE)
        reply = [index for index, begin in enumerate(begins) if begin >= len(before)]
        if whole.startswith(upto):
            reply = [index for index in reply if begins[index] < len(upto)]
        else:
            last = next((index for index in reply if ids[index] in special), None)
            if last is None:
                raise Unfit("the end of a reply cannot be found in the tokens after it")
            reply = [index for index in reply if index <= last]
        for index in reply:
            targets[index] = True
    return ids, targets
