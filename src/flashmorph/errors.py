"""The errors that a user is meant to read."""

import difflib
from collections.abc import Iterable

_LISTED = 40


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
    listed = f"there are {', '.join(known)}" if len(known) <= _LISTED else "and none of the known names is like it"
    hint = f"did you mean {near[0]!r}?" if near else listed
    return f"unknown {kind} {name!r}; {hint}"
