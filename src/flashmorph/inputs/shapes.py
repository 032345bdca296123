"""JSON of an earlier run, checked against the shape that its reader needs: a disk, an editor or a power cut may have
changed it."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from flashmorph.errors import UserError, cut, quoted
from flashmorph.files import read_json

_SEAL = "sha256"
_LARGEST = 2**60
_LONGEST = 60
_SHOWN = 40


def _of_64_bits(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("a whole number should have at most 64 bits")
    return value


_ENDLESS = re.compile(r"\d{20,}")
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e100, le=1e100), BeforeValidator(_of_64_bits)]
"""A number that can be drawn, compared and written out, and that numpy knows."""
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
"""How many there are of something."""


class Shape(BaseModel):
    """Keys that a reader needs, with their types exactly; other keys are left alone."""

    model_config = ConfigDict(strict=True)


def read_as(path: Path, shape: Any) -> Any:
    """The JSON value in `path`, unchanged; `shape` is a type that pydantic knows.

    Raises:
        UserError: the file is missing, is no JSON, or holds something else.
    """
    value = read_json(path)
    require_shape(value, shape, str(path))
    return value


def require_shape(value: Any, shape: Any, name: str) -> None:
    """Refuse a value that is not of this `shape`; `name` is what it is called in the sentence.

    Raises:
        UserError: names what is wrong, and where in it.
    """
    if problem := misfit(value, shape):
        raise UserError(f"{name} is damaged: {problem}")


def misfit(value: Any, shape: Any) -> str:
    """The difference of a JSON value from this `shape`, and its path; empty if there is none."""
    try:
        TypeAdapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        where = f"{key if len(key) <= _LONGEST else key[: _LONGEST - 1] + '…'}: " if key else ""
        # A limit of 1e100 would be written with all its digits.
        message = _ENDLESS.sub(
            lambda number: f"{float(number[0]):.0e}".replace("+", ""), problem["msg"].removeprefix("Value error, ")
        )
        return f"{where}{message[0].lower()}{message[1:]} (got {cut(quoted(problem['input']), _SHOWN)})"
    return ""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """An object of JSON with the digest of all of it beside the rest."""
    return {**values, _SEAL: _digest(values)}


def has_broken_seal(values: Mapping[str, Any]) -> bool:
    """Whether an object is not what `sealed` made."""
    return values.get(_SEAL) != _digest({name: value for name, value in values.items() if name != _SEAL})


def _digest(values: Any) -> str:
    # As it will be read again: keys that are numbers become text, and so sort otherwise.
    read = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]
