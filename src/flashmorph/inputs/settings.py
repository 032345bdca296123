"""Settings, checked by name, type and range before anything is done with them: groups of them, and those that a
function's signature describes.

An annotation is the whole rule: `steps: Annotated[int, Field(ge=1)] = 24`. Who calls the function from Python still
passes plain values.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from flashmorph.errors import UserError, quoted
from flashmorph.records import Figures

_FINITE = ConfigDict(allow_inf_nan=False)

Tokens = Annotated[int, Field(gt=0, le=10**15)]
"""Tokens that a stage reads in all: no machine comes to the end of more."""
TokensAtOnce = Annotated[int, Field(gt=0, le=10**9)]
"""Tokens in a step, or run at once."""
Length = Annotated[int, Field(gt=1, le=10**9)]
"""Tokens in a row: one to read, one to predict."""
Many = Annotated[int, Field(gt=0, le=10**6)]
"""Questions, rows or tokens of which each costs something."""
Rate = Annotated[float, Field(gt=0, le=100)]
"""A learning rate."""
FinalRate = Annotated[float, Field(ge=0, le=100)]
"""A learning rate that a schedule ends at."""
Name = Annotated[str, Field(min_length=1)]
"""The name of something that is looked for: an empty one names nothing."""


class Settings(BaseModel):
    """A group of settings. Names that there are not are refused, numbers that are not finite, and truth values where a
    number is wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python, and so to pydantic, True is the number 1.
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if kinds & {int, float} and bool not in kinds and _has_truth(value):
            raise ValueError("input should be a number, not true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, inside of unions and containers too."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return {annotation}.union(
        *(_kinds(each) for each in get_args(annotation) if get_origin(each) or type(each) is type)
    )


def _has_truth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_truth, value))
    return isinstance(value, bool)


def resolve(
    function: Callable[..., Any], given: Mapping[str, Any], handed: Collection[str], owner: str, prefix: str
) -> Figures:
    """All settings of `function`: its defaults, replaced by what is `given`, as their annotations require.

    Parameters named in `handed` are no settings. Text is read where a number is wanted (`"1e-3"`, which YAML 1.1 does
    not take for one); a truth value is no number. `owner` and `prefix` are for sentences: whose settings these are, and
    the prefix of a setting's name.

    Raises:
        UserError: names a setting that there is not, or one that is wrong, with what would be right.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    known = {name: parameter for name, parameter in parameters.items() if name not in handed}
    for name in given:
        if name not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"{owner} has no setting {quoted(name)}; {there_are}")
    defaults = {name: parameter.default for name, parameter in known.items()}
    return defaults | {
        name: _checked(known[name].annotation, value, f"{prefix}{name}") for name, value in given.items()
    }


def _checked(annotation: Any, value: Any, name: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=_FINITE)
    schema = adapter.json_schema()
    kinds = schema.get("anyOf", [schema])
    try:
        if isinstance(value, bool) and all(kind.get("type") != "boolean" for kind in kinds):
            raise ValueError  # To Python, and so to pydantic, True is the number 1.
        return adapter.validate_python(value)
    except (ValidationError, ValueError) as error:
        right = " or ".join(in_words(kind) for kind in kinds)
        key = name.rpartition(" ")[2]
        is_number = any(kind.get("type") == "string" for kind in kinds) and isinstance(value, int | float)
        hint = f", which YAML reads as a number: write {key}='\"...\"'" if is_number else ""
        raise UserError(f"{name} must be {right}; got {quoted(value)}{hint}") from error


def in_words(schema: Mapping[str, Any]) -> str:
    """The requirement of a JSON schema of one plain value, in words."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[name]:,}" for name, word in bounds.items() if name in schema]
    kind = str(schema.get("type", "another value"))
    return " ".join([words.get(kind, kind), " and ".join(limits)]).strip()
