"""The metadata in front of a model card, which the hub reads: from the run and from the teacher's own card."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from flashmorph.data.corpus import Corpus, shares_of
from flashmorph.errors import UserError
from flashmorph.files import read_text
from flashmorph.inputs.readyaml import read_yaml
from flashmorph.run.run import Run
from flashmorph.surface.quoting import code

_CARD = "README.md"
_LINE = re.compile(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]{0,198}[^\s\x00-\x1f\x7f])?")
"""A short line, as names and addresses of licences are."""


def front_matter(run: Run, tags: list[str]) -> str:
    """The metadata as YAML: what is known, and nothing else.

    A base model is one that has a name on the hub, so that the hub links it, as are the data sets; the licence is the
    teacher's.
    """
    known: dict[str, Any] = licence_of(run)
    if run.teacher.revision:
        known |= {"base_model": run.teacher.name, "base_model_relation": "finetune"}
    streamed = [part.source for part, _ in shares_of(run.corpus) if _is_on_the_hub(part)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flashmorph", "hybrid-attention", *tags],
        datasets=streamed or None,
        **known,
    )
    return data.to_yaml().rstrip("\n") + "\n"


def in_words(run: Run) -> str:
    """The licence, and what has to be added to the metadata by hand before the model is shared."""
    licence = licence_of(run)
    text = f"Licence: the teacher's, {code(licence['license'])} by its own card." if licence else ""
    missing = [] if licence else ["`license` (the teacher came without a card that names one)"]
    if not run.teacher.revision:
        missing.append("`base_model` (the teacher was read from this machine, not from the hub)")
    if not missing:
        return text
    return f"{text} Not known, so not in the metadata of this file: {', '.join(missing)}.".strip()


def licence_of(run: Run) -> dict[str, str]:
    """`license`, and where the teacher's card has them `license_name` and `license_link`; empty where it names none.

    A link to a file beside the teacher's card is made one to the hub; the file itself is not copied.
    """
    values = _metadata(run.teacher.folder / _CARD)
    found = {name: values.get(name) for name in ("license", "license_name", "license_link")}
    found = {name: text for name, text in found.items() if isinstance(text, str) and _LINE.fullmatch(text)}
    if "license" not in found:
        return {}
    if "license_link" in found and "://" not in found["license_link"]:
        file = found.pop("license_link")
        if run.teacher.revision:
            found["license_link"] = f"https://huggingface.co/{run.teacher.name}/blob/{run.teacher.revision}/{file}"
    return found


def _is_on_the_hub(part: Corpus) -> bool:
    try:
        return part.paths() is None
    except UserError:  # Local text that was removed since it was read.
        return False


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is none to read, which must not end a run of hours."""
    try:
        block = REGEX_YAML_BLOCK.search(read_text(card)) if card.is_file() else None
        values = read_yaml(block[2], str(card)) if block else None
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}
