"""Text on a terminal: names of any kind are shown harmlessly, whatever they hold and whatever the terminal can show."""

import codecs
import io
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_STAND_INS = {"■": "#", "□": ".", "·": "-", "…": "...", "±": "+-", "×": "x", "→": "->", "\u00a0": " "}
_KEPT = "\n\t"
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what moves the cursor, turns text around, breaks lines or is no character."""


def harmless(text: str) -> str:
    """`text` with everything that a terminal would obey, or could not show, in its visible form (`\\x1b`).

    Line breaks and tabs stay.
    """
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) in _UNSEEN and char not in _KEPT else char for char in text
    )


def bold(text: str) -> Text:
    """A text that stands out."""
    return Text(harmless(text), style="bold")


class Terminal(Console):
    """A console to which every string is plain text: no markup, no emoji codes, no control characters.

    What shall have a style is a `Text`.
    """

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every string comes through here: printed ones, titles, and cells of tables."""
        return super().render_str(harmless(text), **settings)


def stand_in_for_what_cannot_be_shown() -> None:
    """Let stdout and stderr replace characters that their encoding does not have, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="flashmorph")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_STAND_INS.get(char) or ascii(char)[1:-1] for char in text), error.end


codecs.register_error("flashmorph", _stand_in)
