"""The versions that a result was computed with."""

from importlib.metadata import PackageNotFoundError, version

from flashmorph.records import Figures

_COMPUTE = ("torch", "transformers", "tokenizers", "datasets")


def own_version() -> str:
    """The version of flashmorph that is installed."""
    try:
        return version("flashmorph")
    except PackageNotFoundError:
        return "0+source"


def version_of(package: str) -> str:
    """The version of an installed package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """By package, of all that a stage's result may depend on."""
    return {"flashmorph": own_version(), **{name: version_of(name) for name in _COMPUTE}}


def made_with(record: Figures) -> str:
    """The versions in a stage's record that are others now, in words; nothing where they are the same or not known."""
    now = versions()
    then = record.get("versions", {})
    return ", ".join(f"{name} {then[name]} (now {now[name]})" for name in now if then.get(name, now[name]) != now[name])
