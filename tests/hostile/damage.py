"""Damages of files and of the values in them, drawn from a random generator."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 0.5, -2.5, 10**9, 10**18, 10**30, 10**400, 1e21, 1e308, float("inf"), float("nan"),
    "", " ", "x", "true", "1e3", "-1", "../..", "/etc/passwd", "~", "\u202e\x1b[31m", "[/]", "x" * 5_000, "\x00",
    [], [[]], [1], [1, 2], [None], ["x"], ["x", "x"], [1e308, -1e308], {}, {"": 1}, {"x": 1}, {"x": {"x": {"x": []}}},
)  # fmt: skip
"""Values that stand in the place of others."""


def odd(rng: random.Random) -> Any:
    """An odd value."""
    return rng.choice(ODD)


def places_in(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values inside of a value of JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*before, key)
        yield from places_in(each, (*before, key))


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of a value of JSON with one value in it missing, doubled or in the place of an odd one."""
    value = json.loads(json.dumps(value))
    places = sorted(places_in(value), key=str)
    if not places or rng.random() < 0.05:
        return odd(rng)
    *way, last = rng.choice(places)
    holder = value
    for key in way:
        holder = holder[key]
    if (drawn := rng.random()) < 0.2:
        del holder[last]
    elif drawn < 0.3 and isinstance(holder, list):
        holder.append(holder[last])
    elif drawn < 0.4 and isinstance(holder, dict):
        holder["" if rng.random() < 0.3 else f"{last}s"] = holder.pop(last)
    elif drawn < 0.5 and isinstance(holder[last], str) and holder[last]:
        at = rng.randrange(len(holder[last]))
        holder[last] = holder[last][:at] + rng.choice("\x00é/%é0-") + holder[last][at + 1 :]
    elif drawn < 0.6 and isinstance(holder[last], int | float):
        holder[last] = -holder[last] if rng.random() < 0.5 else holder[last] * 10**12
    else:
        holder[last] = odd(rng)
    return value


def spoiled(rng: random.Random, content: bytes) -> bytes:
    """The content of a file after a power cut, a bad disk or a wrong tool."""
    half = rng.randrange(len(content) + 1)
    flipped = bytearray(content or b"\x00")
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return rng.choice(
        (
            b"",
            content[:half],
            content[: max(0, len(content) - 1)],
            bytes(len(content)),
            content[:half] + bytes(len(content) - half),
            content + b"\xc3",
            content[half:] + content[:half],
            bytes(flipped),
            content * 2,
            b"[" * 50_000,
            b"\xff\xfe\x00",
            b"null",
            rng.randbytes(64),
        )
    )


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file in one way, JSON often inside of its values; what was done."""
    drawn = rng.random()
    if drawn < 0.06:
        path.unlink()
        return "gone"
    if drawn < 0.1:
        path.unlink()
        path.mkdir()
        return "a folder"
    if drawn < 0.75 and path.suffix == ".json":
        path.write_text(
            json.dumps(changed(rng, json.loads(path.read_text()))), encoding="utf-8", errors="surrogatepass"
        )
        return "changed"
    path.write_bytes(spoiled(rng, path.read_bytes()))
    return "spoiled"
