"""Recipes and `--set` as people mistype them, and as nobody should write them."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from conftest import FEW_STEPS

from flashmorph.convert.load import load_config
from flashmorph.recipe.outlook import check_recipe, outlook
from flashmorph.recipe.recipe import Recipe, load_recipe, parse_changes
from flashmorph.selection import STRATEGIES
from hostile.damage import ODD, changed, odd, places_in, spoiled
from hostile.harness import Case
from hostile.seeds import in_turn
from hostile.teachers import copy_of

_TEXTS = (
    "", "~", "[]", "3", "budget", "budget: [", "budget: 1\nbudget: 2", "tasks: {a: {task: hops}, a: {task: hops}}",
    "? [1]\n: 2", "1: 2", "&a [*a]", "&a {x: *a}", "host: &a {x: *a}", "!!python/object/apply:os.getcwd []",
    "budget: !!binary x", "seed: 2026-13-45", "%YAML 9.9\n---\n", "a: 1\n--- \nb: 2", "\t", "{" * 3_000, "[" * 3_000,
    "seed: 0x" + "f" * 5_000, "seed: " + "9" * 5_000, "budget: " + "x" * 100_000, "x" * 400 + ": 1", "\ufeffseed: 1",
    "<<: [1]", "<<: {seed: 1}\nseed: 2", "tasks: *missing", "seed: 1:30", "budget: \"\\ud800\"",
    "tasks: {1: {task: hops}}",
)  # fmt: skip
_BUDGETS = (
    "0", "-1", "2", "100%", "0%", "1e3", "25", "kv=1B@1", "kv=0B@1", "kv=64MiB", "kv=1KiB@99999999999999999999",
    "kv=99999999999999999999GiB@32768", "kv=0.0000000000001B@4096", "loss=1%", "loss=", "٣", "%", "1 ", "kv=1KiB@0",
    "ms=1@64", "ms=0.00001@1", "ms=99999999999999999999@99999999999999999999",
)  # fmt: skip


@cache
def _config() -> Any:
    import tempfile

    return load_config(copy_of("qwen3", Path(tempfile.mkdtemp()) / "teacher"))


@cache
def _shipped() -> dict[str, Any]:
    return yaml.safe_load((files("flashmorph") / "recipes" / "default.yaml").read_text(encoding="utf-8"))


@cache
def _keys() -> tuple[str, ...]:
    """The names of all settings."""
    values = Recipe.model_validate(FEW_STEPS).model_dump(mode="json")
    ways = [".".join(map(str, way)) for way in places_in(values) if not any(isinstance(key, int) for key in way)]
    return (*ways, "select.settings.steps", "select.settings.swaps", "host.window", "host.mamba_expand", "data.mixture")


def _read(path: Path, changes: dict[str, Any] | None = None) -> Callable[[], object]:
    """Read a recipe and look ahead, as every command does before any work."""
    config = _config()

    def look() -> None:
        recipe = load_recipe(path, changes)
        recipe.to_yaml()
        check_recipe(config, recipe)
        outlook("teacher", config, recipe)

    return look


def _written(rng: random.Random) -> Case:
    """A recipe in which one value is something else."""
    values = changed(rng, rng.choice((FEW_STEPS, _shipped())))

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        text = json.dumps(values) if rng.random() < 0.5 else yaml.safe_dump(values)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return _read(path)

    return Case("recipe", f"{str(values)[:60]}", prepare)


def _text(rng: random.Random) -> Case:
    """A file that is hardly a recipe."""
    text = rng.choice(_TEXTS)

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return _read(path)

    return Case("recipe text", text[:40], prepare, must_refuse=True)


def _bomb(rng: random.Random) -> Case:
    """References to references: few lines that stand for more values than any machine holds."""
    wide, merged = rng.randrange(5, 30), rng.random() < 0.3
    lines = [f"x0: &x0 {{k: [{','.join(['1'] * 9)}]}}"]
    for level in range(1, wide):
        before = f"*x{level - 1}"
        many = f"{{<<: [{before}, {before}]}}" if merged else f"{{a: {before}, b: {before}, c: {before}}}"
        lines.append(f"x{level}: &x{level} {many}")
    lines.append(f"{rng.choice(('host', 'select', 'tasks', 'align'))}: *x{wide - 1}")

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        path.write_text("\n".join(lines))
        return _read(path)

    return Case("recipe bomb", f"{wide} levels", prepare, must_refuse=True)


def _spoiled(rng: random.Random) -> Case:
    """A sound recipe after a power cut."""
    content = spoiled(rng, yaml.safe_dump(FEW_STEPS).encode())

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        path.write_bytes(content)
        return _read(path)

    return Case("recipe spoiled", repr(content[:40]), prepare)


def _set(rng: random.Random) -> Case:
    """One setting that is set to something else."""
    key, value = rng.choice(_keys()), odd(rng)
    if rng.random() < 0.1:
        key = rng.choice((f"{key}x", f".{key}", f"{key}.", f"{key}..x", key.upper(), "", "=", f"{key}.x.y"))
    text = value if isinstance(value, str) else json.dumps(value)

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(FEW_STEPS))

        def look() -> None:
            _read(path, parse_changes([f"{key}={text}"]))()

        return look

    return Case("--set", f"{key}={text}"[:80], prepare)


def _strategy(rng: random.Random) -> Case:
    """A strategy with one of its settings wrong."""
    strategy = rng.choice(sorted(STRATEGIES))
    name = rng.choice(
        ("steps", "swaps", "learning_rate", "questions", "max_plans", "offset", "data", "confidence", "x")
    )
    changes = {"select.strategy": strategy, f"select.settings.{name}": odd(rng)}

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(FEW_STEPS))
        return _read(path, changes)

    return Case("strategy", f"{changes}"[:100], prepare)


def _budget(rng: random.Random) -> Case:
    """A budget that is none, or that no model meets."""
    budget = rng.choice((*_BUDGETS, *map(str, ODD)))

    def prepare(folder: Path) -> Callable[[], object]:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(FEW_STEPS))
        return _read(path, {"budget": budget})

    return Case("budget", budget[:60], prepare)


def _command(rng: random.Random) -> Case:
    """The same through the command line, where names may be empty too."""
    empty = rng.choice(("--recipe", "--layers", "--plan", "--data", "--strategy", "--from", "--budget", "--output", ""))
    settings = [f"{rng.choice(_keys())}={json.dumps(odd(rng))[:200]}" for _ in range(2)]
    is_empty = rng.random() < 0.4

    def prepare(folder: Path) -> list[str]:
        teacher = copy_of("qwen3", folder / "teacher")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(FEW_STEPS))
        given = [
            "morph",
            str(teacher),
            "--recipe",
            str(folder / "recipe.yaml"),
            "--output",
            str(folder / "out"),
            "--dry-run",
        ]
        if is_empty:
            return ["morph", "", *given[2:]] if not empty else [*given, empty, ""]
        return [*given, *(part for each in settings for part in ("--set", each))]

    return Case("recipe command", empty if is_empty else str(settings)[:100], prepare, must_refuse=is_empty)


_MAKERS = (_written, _set, _strategy, _written, _text, _set, _budget, _spoiled, _bomb, _set, _written, _command)


def generate(seed: int, number: int) -> Iterator[Case]:
    """`number` cases."""
    return in_turn("recipes", _MAKERS, seed, number)
