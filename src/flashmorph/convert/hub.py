"""Models by name that are no folder here: the embedded ones, and those of the hub, fetched into its own cache."""

import functools
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flashmorph.convert.checkpoint import CONFIG
from flashmorph.errors import UserError, first_line

EMBEDDED = ("tiny",)
_SETTINGS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_BESIDE = (*_WEIGHTS, "README.md")
_OTHER_FORMS = ("consolidated*", "original/*", "onnx/*", "adapter_model*")


def embedded_folder(name: str) -> Path:
    """The folder of the embedded teacher of this name."""
    return Path(str(files("flashmorph") / "assets" / name))


def without_revision(name: str) -> str:
    """The name of a model of the hub without the revision that may stand after it: `ORG/NAME@REVISION`."""
    return name.partition("@")[0]


def at_revision(name: str, revision: str) -> str:
    """The name by which commands take this revision of a model; without a revision the name alone."""
    return f"{name}@{revision}" if revision else name


@functools.cache
def fetched(name: str, weights: bool = True) -> Path:
    """The folder of a model, by `ORG/NAME` its newest revision, by `ORG/NAME@REVISION` that branch, tag or commit.

    Each once a process, so that a push cannot mix two revisions in one table. Without `weights` it has configuration,
    tokenizer and generation settings, and weights only if they were fetched before.

    Raises:
        UserError: the hub has none of that name or revision, or does not give it.
    """
    model, revision = _parts(name)
    # The index is JSON too: without the files that it names it would stand for damaged weights.
    wanted, unwanted = ((*_SETTINGS, *_BESIDE), _OTHER_FORMS) if weights else (_SETTINGS, (*_OTHER_FORMS, *_WEIGHTS))
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*unwanted]))
    except Exception as error:
        raise _not_there(name, error) from error


def fetched_config(name: str) -> Path:
    """The folder of a model's config.json, fetched alone.

    Raises:
        UserError: see `fetched`.
    """
    model, revision = _parts(name)
    try:
        return Path(hf_hub_download(model, CONFIG, revision=revision)).parent
    except Exception as error:
        raise _not_there(name, error) from error


def _parts(name: str) -> tuple[str, str | None]:
    """Model and revision of a name as huggingface_hub's file system has it: a slash in a branch may be `%2F`.

    Raises:
        UserError: nothing stands after the `@`.
    """
    model, separator, revision = name.partition("@")
    if separator and not revision:
        raise UserError(f"{name!r} names no revision: {model}@REVISION takes a branch, tag or commit of it")
    return model, unquote(revision) or None


def _not_there(name: str, error: Exception) -> UserError:
    if isinstance(error, GatedRepoError):
        why = "the hub gives it only to those who accepted its terms: do so on its page, then log in (`hf auth login`)"
    elif isinstance(error, RevisionNotFoundError):
        model, revision = _parts(name)
        why = f"the hub's {model} has no branch, tag or commit {revision!r}"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        why = "the hub has none of that name, or it is private: log in with `hf auth login`"
    elif isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        why = "the hub, which may have it, cannot be reached"
    else:
        why = f"the hub says: {first_line(error)}"
    return UserError(
        f"there is no model {name!r}: it is no folder here, not embedded ({', '.join(EMBEDDED)}), and {why}"
    )
