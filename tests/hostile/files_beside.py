"""What lies beside a teacher's weights: tokenizer, settings and strangers' files under names like theirs."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.config_files import DAMAGES, STRANGE, judge
from hostile.harness import OUTPUT, Case
from hostile.seeds import in_turn
from hostile.teachers import copy_of

SETTINGS = ("tokenizer_config.json", "generation_config.json", "tokenizer.json")
STRANGERS = ["tokenizer_secret.txt", "tokenizer_secret.json", "tokenizer.py", "modeling_x.py", "tokenizer.model.py",
             "chat_template.py", "chat_template_x.jinja", "model.safetensors.py", "evil.so", "vocab.txt.exe",
             "tokenizer.model.v3.py", "setup.sh", ".env"]  # fmt: skip
LED_ASTRAY = ["vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja", "x.tiktoken"]


def generate(seed: int, number: int) -> Iterator[Case]:
    """So many folders with something odd beside the weights."""
    return in_turn("beside", (_stranger, _link, _damaged, _settings, _code), seed, number)


def _stranger(chance: random.Random) -> Case:
    """A file that no tokenizer reads stays where it is."""
    name = chance.choice(STRANGERS)

    def change(teacher: Path) -> None:
        (teacher / name).write_text("secret")

    def judged(folder: Path) -> str:
        brought = (folder / OUTPUT / name).exists()
        return f"{name} was brought along" if brought else judge(folder)

    return _case(name, change, must_accept=True, judged=judged)


def _link(chance: random.Random) -> Case:
    """A link out of the folder is not followed."""
    name = chance.choice(LED_ASTRAY)

    def change(teacher: Path) -> None:
        (teacher.parent / "tokenizer_secret.txt").write_text("secret")
        (teacher / name).symlink_to(Path("..") / "tokenizer_secret.txt")

    return _case(f"{name} is a link", change, must_refuse=True)


def _damaged(chance: random.Random) -> Case:
    name, damage = chance.choice(SETTINGS), chance.choice(list(DAMAGES))

    def change(teacher: Path) -> None:
        path = teacher / name
        path.write_bytes(DAMAGES[damage](chance, path.read_bytes()))

    return _case(f"{name}: {damage}", change)


def _settings(chance: random.Random) -> Case:
    """Values of another kind."""
    name = chance.choice(SETTINGS)

    def change(teacher: Path) -> None:
        path = teacher / name
        values: dict[str, Any] = json.loads(path.read_text())
        for key in chance.sample(sorted(values), min(2, len(values))):
            values[key] = chance.choice(STRANGE)
        path.write_text(json.dumps(values))

    return _case(f"{name}: values", change)


def _code(chance: random.Random) -> Case:
    """A tokenizer that names code of its own, which is neither run nor taken along; and what is no file."""

    def own_code(teacher: Path) -> None:
        path = teacher / "tokenizer_config.json"
        values = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
        path.write_text(json.dumps(values))
        (teacher / "code.py").write_text(f"open({str(teacher.parent / 'ran')!r}, 'w')\n")

    changes: dict[str, Callable[[Path], Any]] = {
        "code of its own": own_code,
        "a pipe": lambda teacher: os.mkfifo(teacher / "vocab.txt"),
        "a folder": lambda teacher: (teacher / "merges.txt").mkdir(),
        "a device": lambda teacher: (teacher / "chat_template.jinja").symlink_to("/dev/zero"),
    }
    name, change = chance.choice(list(changes.items()))
    return _case(name, change, must_accept=True)


def _case(
    name: str,
    change: Callable[[Path], Any],
    must_refuse: bool = False,
    must_accept: bool = False,
    judged: Callable[[Path], str] = judge,
) -> Case:
    def prepare(folder: Path) -> list[str]:
        change(copy_of("qwen3", folder / "t"))
        return ["transplant", str(folder / "t"), "--output", str(folder / OUTPUT)]

    return Case("beside", name, prepare, must_refuse, must_accept, judged)
