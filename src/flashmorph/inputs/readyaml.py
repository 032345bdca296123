"""YAML as people write it, and what pydantic finds wrong with it, in one sentence each."""

import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flashmorph.errors import UserError, cut, quoted, unknown

_LONGEST_NAME, _LONGEST_TEXT = 200, 200_000
_DEEPEST, _MOST_VALUES = 100, 100_000
_LONGEST_MESSAGE = 160


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; of YAML 1.2 it takes that `1e-3` is a number, and that a key stands once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {quoted(key.value)} stands twice in one mapping"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """One more bracket: PyYAML reads all of them, ever slower, before it builds anything."""
        if self.flow_level >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def read_yaml(text: str, name: str) -> Any:
    """The value that `text` stands for; `name` is what the text is called in a sentence.

    Raises:
        UserError: it is no YAML, asks for a Python object, has a key twice, or stands for more values than anyone has.
    """
    name = quoted(name)[1:-1] if len(name) > _LONGEST_NAME else name
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{name} has {len(text):,} characters; settings have at most {_LONGEST_TEXT:,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_bombs(node)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"{name} is not valid YAML: {_cut(str(error.problem))}{where}") from error
    except RecursionError as error:
        raise UserError(f"{name} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # A ValueError: a date or a number that cannot be.
        raise UserError(f"{name} is not valid YAML: {_cut(str(error).split(';')[0])}") from error


def _refuse_bombs(root: yaml.Node | None) -> None:
    """Refuse references (`*name`) that together stand for very many values, or for themselves."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES + 1  # Until it is known: what holds itself is endless.
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if root is not None and size(root) > _MOST_VALUES:
        raise yaml.YAMLError(f"with its references it stands for more than {_MOST_VALUES:,} values")


def _cut(text: str) -> str:
    return cut(" ".join(text.split()), _LONGEST_MESSAGE)


def sentence(error: ValidationError, model: type[BaseModel], replaced: Mapping[str, str] | None = None) -> str:
    """A problem with the settings of `model`, in words; an unknown key is reported with the nearest known name.

    `replaced` are names of earlier versions, each with the message about its replacement.
    """
    # Where one value may be several things, what went furthest is what was meant.
    problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    path, owner = _located(problem["loc"], model)
    if problem["type"] == "extra_forbidden" and (instead := (replaced or {}).get("".join(path))):
        return f"there is no {''.join(path)} any more: {instead}"
    if problem["type"] == "extra_forbidden" and owner:
        parents = path[:-1]
        known = ["".join([*parents, _after(parents, name)]) for name in owner.model_fields]
        return unknown("setting", "".join(path), known)
    message = _cut(problem["msg"].removeprefix("Value error, "))
    message = f"{message[0].lower()}{message[1:]}"
    if not path:  # About several settings together: the message says what they are.
        return message
    return f"{_cut(''.join(path))}: {message} (got {quoted(problem['input'])})"


def _located(location: tuple[int | str, ...], model: Any) -> tuple[list[str], Any]:
    """A path in the settings as people write it, `data.mixture[0].weight`, and the settings class that holds it.

    pydantic also names which member of a union it tried; that is left out.
    """
    path: list[str] = []
    owner, inside = model, model
    for part in location:
        if part == "[key]":
            continue
        models = [each for each in _members(inside) if isinstance(each, type) and issubclass(each, BaseModel)]
        if isinstance(part, int):
            path.append(f"[{part}]")
            inside = next(iter(get_args(_first(inside, tuple, list))), None)
        elif models:
            owner = models[0]
            path.append(_after(path, part))
            inside = owner.model_fields[part].annotation if part in owner.model_fields else None
        elif mapping := _first(inside, dict):
            path.append(_after(path, part))
            inside = get_args(mapping)[1]
    return path, owner


def _members(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *(each for each in get_args(annotation) if get_origin(annotation) not in (tuple, list, dict)))


def _first(annotation: Any, *origins: type) -> Any:
    """The member of a union that is one of these containers, or None."""
    return next((each for each in _members(annotation) if get_origin(each) in origins), None)


def _after(path: list[str], name: str) -> str:
    return f".{name}" if path else name
