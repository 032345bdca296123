"""The errors that a user is meant to read."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_LISTED = 180
_QUOTED = 80
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = _QUOTED


class UserError(ValueError):
    """Bad input or a state that the user can mend: one sentence that says what is wrong, where, and what is right.

    The command line prints it without a traceback and exits with 2.
    """


class OutOfMemory(UserError):
    """A device's memory is not enough; of several processes the one that it happened to tells it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence about an unknown name, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.4)
    names = ", ".join(known)
    listed = f"there are {names if len(names) <= _LISTED else names[:_LISTED].rpartition(', ')[0] + ', …'}"
    hint = f"did you mean {near[0]!r}?" if near else listed
    return f"unknown {kind} {quoted(name)}; {hint}"


def quoted(value: Any) -> str:
    """A value as it was given, cut where it is long: a sentence stays a sentence, however large or nested the value."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits.
        text = "a number of thousands of digits"
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"
