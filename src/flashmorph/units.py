"""Quantities as people write them."""

from collections.abc import Iterable

_POWERS = (("", 1e0), ("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18), ("Z", 1e21))
_BYTES = (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))


def amount(value: float) -> str:
    """Three digits and a letter for the power of ten: `1.72G`."""
    letter, power = next(pair for pair in reversed(_POWERS) if value >= 0.9995 * pair[1] or pair[1] == 1)
    return f"{value / power:.3g}{letter}"


def byte_size(value: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    unit, size = next(pair for pair in reversed(_BYTES) if value >= pair[1] or pair[1] == 1)
    return f"{value / size:,.1f} {unit}"


def longest_context(caches: Iterable[Iterable[str]]) -> str:
    """The longest context that the caches of several models are known at; contexts are keys, as in results.json."""
    return max(set.intersection(*(set(each) for each in caches)), key=int)


def counted(number: int, noun: str) -> str:
    """`1 fact`, `2 facts`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(words: Iterable[str]) -> str:
    """`a, b and c`; nothing of no words."""
    *most, last = (*words,) or ("",)
    return " and ".join(filter(None, (", ".join(most), last)))


def rough_time(seconds: float) -> str:
    """Seconds in words, as exactly as one plans by: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"
