"""The errors that a user is meant to read."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_LISTED = 180
_QUOTED = 80
_MESSAGE = 160
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = _QUOTED


class UserError(ValueError):
    """Bad input or a state that the user can mend: one sentence that names the fault, where it is, and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class OnEveryRank(UserError):
    """Raised on every rank alike under torchrun, so that rank 0 alone reports it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left: PyTorch has an error of its own for CUDA, for an Apple chip a sentence."""
    kind = type(error)
    if kind.__name__ == "OutOfMemoryError" and kind.__module__.partition(".")[0] == "torch":
        return True
    return isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence about an unknown name, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.4)
    names = ", ".join(known)
    listed = f"there are {names if len(names) <= _LISTED else names[:_LISTED].rpartition(', ')[0] + ', …'}"
    hint = f"did you mean {near[0]!r}?" if near else listed
    return f"unknown {kind} {quoted(name)}; {hint}"


def first_line(error: BaseException) -> str:
    """The message of another library's error as one short line.

    A first line that ends with a colon introduces the second, which is then kept too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return cut(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), _MESSAGE)


def cut(text: str, most: int = _QUOTED) -> str:
    """A text from a file or a library, shortened at the end if it is long."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def quoted(value: Any) -> str:
    """A value as it was given, shortened if it is long, so that a large or nested value does not fill the message."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits.
        text = "a number of thousands of digits"
    return cut(text)
