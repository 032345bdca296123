"""Rows as people have them, as documents: a text, a conversation, a prompt and its completion, an instruction and its
output."""

import hashlib
import json
import reprlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmorph.data.chat import CHAT_COLUMNS, TOOLS_COLUMN, Message, messages_in, spoken, tools_in
from flashmorph.errors import UserError, quoted
from flashmorph.records import Figures

HELD_OUT_SHARES = {"validation": 0.05, "referee": 0.05, "test": 0.05}
_PROMPT, _COMPLETION = "prompt", "completion"
_INSTRUCTION, _INPUT, _OUTPUT = "instruction", "input", "output"
_PAIRS = ((_PROMPT, _COMPLETION), (_INSTRUCTION, _OUTPUT))
"""Columns that make a document together: TRL's prompt-completion type, and Alpaca's rows."""
BESIDE = (*(name for pair in _PAIRS for name in pair), _INPUT, TOOLS_COLUMN)
"""Columns that are read beside those of `text_columns`."""


def split_of(text: str) -> str:
    """The split that a document belongs to, from the digest of its text alone: no order or seed can move it."""
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    for split, share in HELD_OUT_SHARES.items():
        if point < share:
            return split
        point -= share
    return "train"


@dataclass(frozen=True)
class Document:
    """A text, or a conversation: then `text` joins its messages, and `tools` are the tools that it may call.

    Its first `prompt` characters (messages of a conversation) are a prompt, and the rest its completion; None: it has
    none. The prompt is no part of what a document is known by: the same text is the same document.
    """

    text: str
    messages: list[Message] | None = None
    tools: Any = None
    prompt: int | None = field(default=None, repr=False, compare=False)

    @property
    def split(self) -> str:
        """The split that it belongs to."""
        return split_of(self.text + (json.dumps(self.tools, sort_keys=True, default=str) if self.tools else ""))


def text_columns(column: str) -> tuple[str, ...]:
    """The columns that may hold text or a conversation by themselves, in order of preference: `column` first."""
    return tuple(dict.fromkeys((column, *CHAT_COLUMNS)))


def is_row(names: Collection[str], columns: Iterable[str]) -> bool:
    """Whether a row with columns of these names is a document by one of `columns`, or by two columns together."""
    return any(name in names for name in columns) or any(set(pair) <= set(names) for pair in _PAIRS)


def is_half(names: Collection[str]) -> bool:
    """Whether a row has a prompt or an instruction, and not what follows it."""
    return any(first in names and second not in names for first, second in _PAIRS)


def no_column(where: str, column: str, there: Sequence[str]) -> UserError:
    """The error for rows without the wanted column."""
    halves = [f"{first!r} is read with {second!r} beside it" for first, second in _PAIRS if first in there]
    names = ", ".join(map(quoted, there))
    remedy = "; ".join([*halves, "name yours, --set data.column=NAME"])
    return UserError(f"{where} has no column {column!r}; it has {names}: {remedy}")


def document_of(row: Figures, column: str, where: str) -> Document | None:
    """The document that a row holds; None if all that it could be is null or empty.

    What `column` or a column of `CHAT_COLUMNS` holds is preferred to a prompt with its completion, and that to an
    instruction with its output. A text prompt and its completion are one text; two lists of messages are one
    conversation (https://huggingface.co/docs/trl/dataset_formats). An instruction and its input, joined by an empty
    line, are a user's message, and the output is the reply.

    Args:
        row: The row's columns.
        column: That of text, or of conversations.
        where: The row's source, for messages.

    Raises:
        UserError: the row has none of the columns, half of what belongs together, or something else in a column.
    """
    columns = text_columns(column)
    if not is_row(row, columns):
        raise no_column(where, column, list(row))
    name = next((name for name in columns if row.get(name) is not None), None)
    try:
        if name is None:
            return _of_pair(row, where, may_be_null=any(name in row for name in columns))
        return _of_column(row, name, where)
    except RecursionError as error:
        named = f"column {name!r}" if name else "a column"
        raise UserError(f"{where}: {named} holds a value that is nested too deep to read") from error


def _of_column(row: Figures, column: str, where: str) -> Document | None:
    value = row[column]
    if value == "":
        return None
    messages = messages_in(value, in_json=column in CHAT_COLUMNS)
    if messages is not None:
        return Document(spoken(messages), messages, tools_in(row.get(TOOLS_COLUMN)))
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} holds {reprlib.repr(value)}, which is neither text nor a "
            "conversation: give text, or a list of messages that have 'role' and 'content'"
        )
    return Document(value)


def _of_pair(row: Figures, where: str, may_be_null: bool) -> Document | None:
    """`may_be_null`: the row has a column of text, which is null, and passed over as such rows are."""
    there = {name for pair in _PAIRS for name in pair if row.get(name) is not None}
    if {_PROMPT, _COMPLETION} <= there:
        return _completed(row, where)
    if {_INSTRUCTION, _OUTPUT} <= there:
        return _instructed(row, where)
    for first, second in _PAIRS:
        if len(half := {first, second} & there) == 1 and not may_be_null:
            missing = second if first in half else first
            raise UserError(f"{where}: a row has {half.pop()!r} and no {missing!r}, which belong together: give both")
    return None


def _completed(row: Figures, where: str) -> Document | None:
    parts = [row[name] for name in (_PROMPT, _COMPLETION)]
    prompt, completion = [messages_in(part, in_json=True) for part in parts]
    if all(isinstance(part, str) for part in parts) and not (prompt and completion):
        return Document("".join(parts), prompt=len(parts[0])) if parts[1] else None
    if prompt is None or completion is None or len({type(part) for part in parts}) > 1:
        kinds = [f"{name!r} is {_kind(row[name])}" for name in (_PROMPT, _COMPLETION)]
        raise UserError(f"{where}: {' and '.join(kinds)} in a row: give two texts, or two lists of messages")
    messages = prompt + completion
    return Document(spoken(messages), messages, tools_in(row.get(TOOLS_COLUMN)), len(prompt)) if completion else None


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    return "a list of messages" if messages_in(value) is not None else reprlib.repr(value)


def _instructed(row: Figures, where: str) -> Document | None:
    parts = {name: row.get(name) for name in (_INSTRUCTION, _INPUT, _OUTPUT)}
    parts = {name: "" if part is None else part for name, part in parts.items()}
    if other := next((name for name, part in parts.items() if not isinstance(part, str)), None):
        raise UserError(f"{where}: {other!r} is {_kind(parts[other])} in a row with {_INSTRUCTION!r}: give a text")
    asked = "\n\n".join(part for part in (parts[_INSTRUCTION], parts[_INPUT]) if part.strip())
    if not asked or not parts[_OUTPUT]:
        return None
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": parts[_OUTPUT]}]
    return Document(spoken(messages), messages)
