"""Plans, and layers given by hand, that are damaged or of another model."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from conftest import FEW_STEPS

from flashmorph.convert.load import load_config
from flashmorph.plan import FULL, Budget, Plan
from flashmorph.recipe.given import given_plan
from flashmorph.recipe.recipe import Recipe
from hostile.damage import changed, damage, odd
from hostile.harness import Case
from hostile.seeds import in_turn
from hostile.teachers import copy_of

_LAYERS = (
    "", ",", "0,", "0,0", "2", "-1", "0 1", "0;1", "0,1", "1e0", "٣", "0x1", "+1", "0.0", "all", "none", "0" * 400,
    "9" * 30, " ", "layers.0", "\x1b[31m", "0,\n1", "null",
)  # fmt: skip


@cache
def _config() -> Any:
    import tempfile

    return load_config(copy_of("qwen3", Path(tempfile.mkdtemp()) / "teacher"))


def _sound(rng: random.Random) -> dict[str, Any]:
    scores = [{FULL: 0.5, "linear": 0.0}, {FULL: 0.25, "linear": 0.0}] if rng.random() < 0.5 else []
    return Plan({"layers.0": FULL, "layers.1": "linear"}, Budget("layers", 1), "nll", 1, "x", "", scores).to_dict()


def _write(folder: Path, text: str) -> Path:
    path = folder / "plan.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def _fitted(path: Path | None, layers: str | None = None) -> Callable[[], object]:
    """A plan that is read and held against the teacher, as a command does before any work."""
    config = _config()

    def look() -> None:
        plan = given_plan("teacher", config, Recipe.model_validate(FEW_STEPS), path, layers)
        assert plan
        assert plan.strip() and len(plan.full_layers) == 1

    return look


def _changed(rng: random.Random) -> Case:
    """A plan in which one value is something else."""
    values = changed(rng, _sound(rng))
    return Case("plan", str(values)[:80], lambda folder: _fitted(_write(folder, json.dumps(values))))


def _damaged(rng: random.Random) -> Case:
    """A plan after a power cut."""

    def prepare(folder: Path) -> Callable[[], object]:
        damage(rng, path := _write(folder, json.dumps(_sound(rng))))
        return _fitted(path)

    return Case("plan damaged", "", prepare)


def _other(rng: random.Random) -> Case:
    """A plan of another model, or of none."""
    values = _sound(rng)
    number, kept = (
        rng.choice((0, 1, 3, 28, 2_000)),
        rng.choice((FULL, "linear", "sliding", "mamba", "", "[/]", "x" * 300)),
    )
    form = rng.choice(("layers.{}", "blocks.{}", "{}", "layers.{}.0", "layers. {}", "layers.0{}", "layers.-{}"))
    values["assignments"] = {form.format(each): kept for each in range(number)}
    values["scores"] = rng.choice(
        ([], [{FULL: 1.0, "linear": 0.0}] * number, [[1.0, 0.0]] * number, [{"linear": 1.0}] * number)
    )
    return Case(
        "plan of another",
        f"{number} {form} {kept[:20]}",
        lambda folder: _fitted(_write(folder, json.dumps(values))),
        True,
    )


def _twice(rng: random.Random) -> Case:
    """A plan that says one thing twice."""
    text = json.dumps(_sound(rng))
    key = rng.choice(('"version": 1', '"layers.0": "full"', '"seed": 1'))
    return Case("plan twice", key, lambda folder: _fitted(_write(folder, text.replace(key, f"{key}, {key}", 1))), True)


def _layers(rng: random.Random) -> Case:
    """Layers by hand."""
    layers = rng.choice((*_LAYERS, str(odd(rng))))
    return Case(
        "layers", layers[:40], lambda folder: _fitted(None, layers), must_refuse=layers.strip() not in ("0", "1")
    )


def _command(rng: random.Random) -> Case:
    """The same through the command line."""
    values = changed(rng, _sound(rng))

    def prepare(folder: Path) -> list[str]:
        teacher = copy_of("qwen3", folder / "teacher")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(FEW_STEPS))
        plan = _write(folder, json.dumps(values))
        given = [
            "--recipe",
            str(folder / "recipe.yaml"),
            "--output",
            str(folder / "out"),
            "--plan",
            str(plan),
            "--dry-run",
        ]
        return ["morph", str(teacher), *given]

    return Case("plan command", str(values)[:80], prepare)


_MAKERS = (
    _changed,
    _damaged,
    _other,
    _changed,
    _layers,
    _twice,
    _changed,
    _damaged,
    _other,
    _layers,
    _changed,
    _command,
)


def generate(seed: int, number: int) -> Iterator[Case]:
    """`number` cases."""
    return in_turn("plans", _MAKERS, seed, number)
