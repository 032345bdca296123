"""The text of a recipe, and its values: of a shipped one, or of a user's file, which starts from `default`."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from flashmorph.errors import UserError, quoted
from flashmorph.files import read_text
from flashmorph.inputs.readyaml import read_yaml
from flashmorph.records import SettingValues

SHIPPED = ("demo", "laptop", "default", "chat")
_START = "default"
"""What a user's file starts from: the recipe of `morph` for every teacher but the embedded ones."""


def recipe_text(source: str | Path) -> tuple[str, str]:
    """The text of a recipe as it was written, with its comments, and its name in a sentence.

    Raises:
        UserError: it is neither shipped nor a file, or is not UTF-8.
    """
    if str(source) in SHIPPED:
        return (files("flashmorph") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8"), f"recipe {source}"
    path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no recipe {quoted(str(source))}: give {', '.join(SHIPPED)}, or a YAML file")
    return read_text(path, f"recipe {path}"), f"recipe {path}"


def recipe_values(source: str | Path) -> tuple[SettingValues, tuple[str, ...]]:
    """The values in a recipe, and the groups of settings that it leaves out.

    Groups that a user's file leaves out (`tasks`, `data`, `align`, ...) are those of `default`. A group that it has is
    wholly its own: settings of `default` would not fit to another strategy or another source of text.

    Raises:
        UserError: see `recipe_text`; or it is no YAML, or no mapping.
    """
    values, start = _mapping(source), {}
    if str(source) not in SHIPPED:
        start = {name: value for name, value in _mapping(_START).items() if isinstance(value, dict)}
    return {**start, **values}, tuple(name for name in start if name not in values)


def _mapping(source: str | Path) -> dict[str, Any]:
    text, name = recipe_text(source)
    values = read_yaml(text, name)
    if not isinstance(values, dict):
        raise UserError(f"{name} must be a mapping of settings, such as `budget: 25%`")
    return values
