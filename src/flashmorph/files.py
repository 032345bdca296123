"""Files that are either written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from flashmorph.errors import UserError

PART = ".part"
"""How the name of a file ends that is being written."""
GENERATION = "generation_config.json"
_TOKENIZER_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template"
_TRAVELS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    f"{_TEMPLATE}*",
    "additional_chat_templates/*.jinja",
    GENERATION,
)


@contextmanager
def atomic_path(target: Path, over_folder: bool = False) -> Iterator[Path]:
    """A temporary path (file or folder, the caller's choice) beside `target` that takes its place on success.

    An existing file is replaced; an existing folder only with `over_folder`.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    target = Path(target)
    temporary = target.parent / f".{target.name}.{uuid4().hex[:8]}{PART}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if over_folder and target.is_dir():
            # A folder with files in it cannot be renamed over.
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()


def write_json(target: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def weights_digest(folder: Path) -> str:
    """Of a checkpoint's configuration and weights alone, so that another tokenizer or template leaves them as they are."""
    return _digest_of_files(
        folder, [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.index.json")]
    )


def travelling_files(folder: Path) -> list[Path]:
    """What goes with the weights in `folder` into every checkpoint that is made of them: tokenizer, chat templates and
    generation settings."""
    return sorted({path for pattern in _TRAVELS for path in folder.glob(pattern) if path.is_file()})


def tokenizer_digest(folder: Path) -> str:
    """Of the files that make tokens of a text."""
    parts = [path for path in travelling_files(folder) if not _is_template(path) and path.name != GENERATION]
    return _digest_of_files(folder, parts)


def template_digest(folder: Path) -> str:
    """Of the chat templates, also of those inside of tokenizer_config.json."""
    inside = _settings_of_tokenizer(folder).get(_TEMPLATE)
    parts = [path for path in travelling_files(folder) if _is_template(path)]
    return _shortened(hashlib.sha256(f"{json.dumps(inside)} {_digest_of_files(folder, parts)}".encode()))


@cache
def content_digest(path: Path, size: int, changed: int, most: int) -> str:
    """Of a file of `size` bytes, last `changed` then, which is read once: whole, or where it is longer than `most` bytes
    as many of it, in blocks at equal distances."""
    block = 1 << 16
    number = max(1, most // block)
    starts = (
        range(0, size, block) if size <= most else (place * (size - block) // number for place in range(number + 1))
    )
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(block))
    return _shortened(digest)


def _digest_of_files(folder: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(folder)).encode())
        if path.name == _TOKENIZER_SETTINGS and (values := _settings_of_tokenizer(folder)):
            values = {name: value for name, value in values.items() if name != _TEMPLATE}
            digest.update(json.dumps(values, sort_keys=True).encode())
            continue
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return _shortened(digest)


def _settings_of_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; nothing where it is missing or damaged, which is told when the tokenizer is opened."""
    try:
        values = json.loads((folder / _TOKENIZER_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_template(path: Path) -> bool:
    return path.name.startswith(_TEMPLATE) or path.suffix == ".jinja"


def _shortened(digest: Any) -> str:
    return digest.hexdigest()[:12]


def short_names(names: Sequence[str], most: int = 20) -> dict[str, str]:
    """What to call folders in a table: the ends of their paths that tell them apart, cut at the front if long."""
    parts = {name: Path(name).parts for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        size = next((size for size in range(1, len(own)) if all(own[-size:] != other[-size:] for other in others)), 0)
        text = "/".join(own[-size:])
        found[name] = text if len(text) <= most else "…" + text[1 - most :]
    return found
