"""The errors that a user is meant to read."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_LISTED = 180
_ALIKE = 0.75
"""difflib's ratio of names that differ by a slip: one letter in four."""
_BEGINNING = 3
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
    """One sentence about an unknown name, with the known one that was probably meant, or else with all of them."""
    known = list(known)
    near = nearest(name, known)
    names = ", ".join(known)
    listed = f"there are {names if len(names) <= _LISTED else names[:_LISTED].rpartition(', ')[0] + ', …'}"
    hint = f"did you mean {near!r}?" if near else listed
    return f"unknown {kind} {quoted(name)}; {hint}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: one with a slip in it, or one that begins as the other does.

    Of settings in groups the last part is compared: what stands before it is the same in all of them. The first letter
    must be right: `v100` is another thing than `a100`.
    """
    own = name.rpartition(".")[2].lower()
    ends = {each.rpartition(".")[2].lower(): each for each in known}
    ends = {end: each for end, each in ends.items() if end[:1] == own[:1]}
    if near := difflib.get_close_matches(own, ends, 1, _ALIKE):
        return ends[near[0]]
    if len(own) < _BEGINNING:
        return None
    within = [end for end in ends if len(end) >= _BEGINNING and (end.startswith(own) or own.startswith(end))]
    return ends[min(within, key=lambda end: abs(len(end) - len(own)))] if within else None


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
