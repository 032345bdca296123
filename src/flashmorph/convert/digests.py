"""The digests of a checkpoint's files: one of the weights, one of the tokenizer, one of the chat templates."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from flashmorph.convert.checkpoint import BLOBS, CONFIG, GENERATION, TOKENIZER_SETTINGS, travelling_files, weight_files
from flashmorph.errors import UserError
from flashmorph.files import read_json, shortened
from flashmorph.records import SettingValues

_TEMPLATE = "chat_template"
_NOT_OF_TOKENS = (_TEMPLATE, "auto_map")
_IS_SHA256 = re.compile("[0-9a-f]{64}").fullmatch


def weights_digest(folder: Path) -> str:
    """Of a checkpoint's configuration and weights: with another tokenizer or template they are the same.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """
    return _digest_of_files(folder, [folder / CONFIG, *weight_files(folder)])


def tokenizer_digest(folder: Path) -> str:
    """Of the files that make tokens of a text."""
    parts = [path for path in travelling_files(folder) if not _is_template(path) and path.name != GENERATION]
    return _digest_of_files(folder, parts)


def template_digest(folder: Path) -> str:
    """Of the chat templates, also of those inside of tokenizer_config.json."""
    inside = _settings_of_tokenizer(folder).get(_TEMPLATE)
    parts = [path for path in travelling_files(folder) if _is_template(path)]
    return shortened(hashlib.sha256(f"{json.dumps(inside)} {_digest_of_files(folder, parts)}".encode()))


def _digest_of_files(folder: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(folder)).encode())
        if path.name == TOKENIZER_SETTINGS and (values := _settings_of_tokenizer(folder)):
            values = {name: value for name, value in values.items() if name not in _NOT_OF_TOKENS}
            digest.update(json.dumps(values, sort_keys=True).encode())
            continue
        try:
            digest.update(_sha256(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return shortened(digest)


def _sha256(path: Path) -> bytes:
    """Of a file's content. In the hub's cache large files have it as their name: reading all weights takes minutes."""
    blob = path.resolve()
    if blob.parent.name == BLOBS and _IS_SHA256(blob.name):
        return bytes.fromhex(blob.name)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _settings_of_tokenizer(folder: Path) -> SettingValues:
    """tokenizer_config.json; empty if it is missing or damaged, which is reported when the tokenizer is opened."""
    try:
        values = read_json(folder / TOKENIZER_SETTINGS)
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}


def _is_template(path: Path) -> bool:
    return path.name.startswith(_TEMPLATE) or path.suffix == ".jinja"
