"""Settings that a function's signature describes: checked by name, type and range before the function is called.

A parameter's annotation is the whole rule: `steps: Annotated[int, Field(ge=1)] = 24`. Who calls the function from
Python still passes plain values.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from flashmorph.errors import UserError, quoted

_FINITE = ConfigDict(allow_inf_nan=False)


def resolve(
    function: Callable[..., Any], given: Mapping[str, Any], handed: Collection[str], owner: str, prefix: str
) -> dict[str, Any]:
    """All settings of `function`: its defaults, and what is `given` in their place, as their annotations want them.

    Parameters named in `handed` are no settings. Text is read where a number is wanted (`"1e-3"`, which YAML 1.1 does
    not take for one); a truth value is no number. `owner` and `prefix` are for sentences: whose settings these are, and
    what stands before a setting's name.

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
        raise UserError(f"{name} must be {right}; got {quoted(value)}") from error


def in_words(schema: Mapping[str, Any]) -> str:
    """What a JSON schema of one plain value asks for."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[name]:,}" for name, word in bounds.items() if name in schema]
    kind = str(schema.get("type", "another value"))
    return " ".join([words.get(kind, kind), " and ".join(limits)]).strip()
