"""Names inside other languages: shell, Python, Markdown. Names of folders, tasks and teachers can be any text."""

import json
import re
import shlex
from collections.abc import Iterable

from flashmorph.surface.terminal import harmless

_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~$#!{}]")


def shell_command(words: Iterable[str]) -> str:
    """A command whose words arrive in a shell as they are."""
    return shlex.join(words)


def no_option(name: str) -> str:
    """A name as a word of a command: with a dash in front it would be an option."""
    return f"./{name}" if name.startswith("-") else name


def python_string(text: str) -> str:
    """A literal of Python, and of JSON as far as that goes."""
    return "".join(char if char.isprintable() else _escaped(char) for char in json.dumps(text, ensure_ascii=False))


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def markdown(text: str) -> str:
    """One line of plain text in Markdown, also in a cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """One line in Markdown's typewriter style: its fence is longer than any row of backticks in it."""
    line = one_line(text)
    fence = "`" * (_longest_row(line) + 1)
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Lines of Markdown that are shown as they are."""
    fence = "`" * max(3, _longest_row(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def one_line(text: str) -> str:
    """`text` with line breaks and tabs in their visible form, as other control characters."""
    return harmless(text).replace("\n", r"\n").replace("\t", r"\t")


def encodable(text: str) -> str:
    """`text` as it can be written in UTF-8: halves of characters, from names in no encoding, in their visible form."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _longest_row(text: str) -> int:
    return max((len(row) for row in re.findall("`+", text)), default=0)
