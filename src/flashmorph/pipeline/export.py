"""A hybrid as a GGUF file, written by the user's own llama.cpp converter with the host's settings, and checked."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from flashmorph.convert.checkpoint import CONFIG, travelling_content, travelling_files, weight_files
from flashmorph.convert.load import load_config
from flashmorph.devices import dtype_name
from flashmorph.errors import UserError, quoted
from flashmorph.files import atomic_path, read_json, write_json
from flashmorph.hosts import host_of
from flashmorph.hosts.serving import Gguf, full_interval
from flashmorph.plan import FULL, Plan
from flashmorph.records import Figures
from flashmorph.run.marker import MARKER
from flashmorph.surface.outputs import claim_output
from flashmorph.versions import own_version

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("f32", "bf16", "f16", "q8_0")
"""The `--outtype`s of the converter that are offered; llama-quantize makes all others."""
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
_UNKNOWN_MODULE = "No module named "


def export_gguf(
    folder: Path, target: Path, llama_cpp: Path, dtype: str | None = None, force: bool = False
) -> tuple[str, ...]:
    """Write the hybrid in `folder` as the GGUF file `target`; returns the option of each layer, as the file has it.

    `llama_cpp` is a checkout of llama.cpp; `dtype` one of `TYPES`, by default what the checkpoint is in. All that can
    be known before is checked before; the file appears whole, or not at all.

    Raises:
        UserError: llama.cpp does not run such a hybrid; the file exists and `force` is not set; `dtype` is not offered;
            the converter is missing, too old, or fails; what it wrote has other layers than the hybrid.
    """
    if dtype not in (None, *TYPES):
        raise UserError(
            f"--dtype {quoted(dtype)} is none of {', '.join(TYPES)}: make other types from the file with llama.cpp's "
            "llama-quantize"
        )
    claim_output(target, None, force)
    config = _config_of(folder)
    form, options = gguf_form(folder, config)
    weight_files(folder)
    require_converter(llama_cpp, form, options)
    with TemporaryDirectory() as temporary, atomic_path(target) as file:
        source = Path(temporary) / (folder.resolve().name or "model")
        lay_out(folder, config, source)
        card = Path(temporary) / "card.json"
        write_json(card, card_of(folder, config, options))
        outtype = dtype or _OUTTYPES.get(dtype_name(config.dtype), "auto")
        _convert([sys.executable, str(llama_cpp / CONVERTER), str(source), "--outfile", str(file), "--outtype", outtype,
                  *form.flags, "--metadata", str(card)], folder, llama_cpp)  # fmt: skip
        with _gguf_package(llama_cpp) as package:
            wanted = form.fields(config)
            set_fields(package, file, wanted)
            fields = read_fields(package, file)
        require_layers(fields, form, options)
        require_fields(fields, wanted)
    return options


def _config_of(folder: Path) -> PreTrainedConfig:
    if (folder / MARKER).is_file() and not (folder / CONFIG).is_file():
        raise UserError(
            f"the run {folder} has no hybrid yet: let `flashmorph morph` finish it, or give the folder of a checkpoint "
            "that `flashmorph build`, `distill` or `extend` names"
        )
    return load_config(folder)


def gguf_form(folder: Path, config: PreTrainedConfig) -> tuple[Gguf, tuple[str, ...]]:
    """How the checkpoint in `folder` becomes a GGUF file, and the option of each of its layers.

    Raises:
        UserError: it is no host's, or llama.cpp does not run it.
    """
    host = host_of(config)
    for engine in host.engines:
        if engine.gguf and engine.fits(config):
            return engine.gguf, tuple(option for (option,) in host.options(config))
        if engine.gguf:
            raise UserError(f"{engine.name} does not run {folder} as it is: it needs {engine.needs}")
    raise UserError(
        f"{host.name}, the class of {folder}, is not known to run in llama.cpp; `flashmorph hosts` says what runs it"
    )


def require_converter(llama_cpp: Path, form: Gguf, options: Sequence[str]) -> None:
    """Refuse a folder that is no llama.cpp, or one whose converter does not write such a plan.

    Raises:
        UserError: names what is missing.
    """
    if not (llama_cpp / CONVERTER).is_file():
        raise UserError(f"{llama_cpp} has no {CONVERTER}: give the folder of a checkout of llama.cpp")
    writer = _gguf_folder(llama_cpp) / "gguf_writer.py"
    knows = writer.is_file() and f"def {form.irregular}(" in writer.read_text(encoding="utf-8")
    if form.irregular and not full_interval(list(options)) and not knows:
        raise UserError(
            f"the converter in {llama_cpp} is too old for a plan whose full layers are not at regular intervals: it "
            f"would be run with other layers, without a word; take a newer llama.cpp ({writer.name} with "
            f"{form.irregular})"
        )


def _gguf_folder(llama_cpp: Path) -> Path:
    """The folder in which the converter finds the package `gguf`: beside itself, else where it is installed."""
    own = llama_cpp / "gguf-py" / "gguf"
    if own.is_dir():
        return own
    spec = importlib.util.find_spec("gguf")
    if not spec or not spec.origin:
        raise UserError(
            f"the converter in {llama_cpp} needs the package gguf, which is neither beside it (gguf-py) nor installed: "
            "take a whole checkout of llama.cpp, or pip install gguf"
        )
    return Path(spec.origin).parent


@contextmanager
def _gguf_package(llama_cpp: Path) -> Iterator[Any]:
    """The package `gguf` that the converter used."""
    package = str(_gguf_folder(llama_cpp).parent)
    sys.path.insert(0, package)
    try:
        yield importlib.import_module("gguf")
    finally:
        sys.path.remove(package)


def lay_out(folder: Path, config: PreTrainedConfig, target_folder: Path) -> None:
    """Make `target_folder` a copy of the checkpoint in `folder`: links to its weights, its other files, a config.json
    that engines read. Code, and settings that name code, are left out: the converter would run it."""
    target_folder.mkdir()
    for path in weight_files(folder):
        os.symlink(path.resolve(), target_folder / path.name)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    for path in [*travelling_files(folder), *([index] if index.is_file() else [])]:
        target = target_folder / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(travelling_content(path))
    values = {name: value for name, value in read_json(folder / CONFIG).items() if name != "auto_map"}
    values.setdefault("rope_parameters", config.rope_parameters)
    write_json(target_folder / CONFIG, host_of(config).serialise(values))


def card_of(folder: Path, config: PreTrainedConfig, options: Sequence[str]) -> Figures:
    """What the file says of itself, by the names of its metadata: the layers, and as far as known where they come from.

    A teacher is the base model where it has a name on the hub; of a folder only the last part is named.
    """
    host = host_of(config)
    mixers = [host.mixers[option].name for option in dict.fromkeys(options) if option != FULL]
    if not mixers:
        return {}
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").is_file() else None
    teacher = plan.teacher if plan and plan.revision else Path(plan.teacher).name if plan else ""
    layers = _full([option != FULL for option in options])
    chosen = f" (chosen by {plan.strategy} for the budget {plan.budget})" if plan else ""
    hybrid = f"Hybrid of {teacher}" if teacher else "Hybrid"
    values: Figures = {
        "general.description": f"{hybrid}, made by flashmorph {own_version()}: layers {layers} of {len(options)} keep "
        f"full attention{chosen}, the others are {' or '.join(mixers)}.",
        "general.tags": ["flashmorph", "hybrid-attention", "text-generation"],
    }
    if plan and plan.revision:
        owner, _, name = teacher.rpartition("/")
        base = {"name": name, "organization": owner, "repo_url": f"https://huggingface.co/{teacher}"}
        values["general.base_models"] = [{key: value for key, value in base.items() if value}]
    return values


def _convert(command: list[str], folder: Path, llama_cpp: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it printed nothing"]
    if any(_UNKNOWN_TOKENIZER in line for line in lines):
        raise UserError(
            f"llama.cpp does not know the tokenizer in {folder}, which it must to cut text as that does: use a teacher "
            "with a published tokenizer, or add yours to llama.cpp (its convert_hf_to_gguf_update.py says how)"
        )
    if _UNKNOWN_MODULE in lines[-1]:
        module = lines[-1].rpartition(_UNKNOWN_MODULE)[2]
        raise UserError(f"the converter in {llama_cpp} needs the package {module}, which is not installed here")
    raise UserError(f"the converter in {llama_cpp} failed: {lines[-1].strip()}")


def set_fields(package: Any, file: Path, wanted: Mapping[str, Any]) -> None:
    """Replace scalars in the file's metadata, by their names without the architecture, where they are there."""
    reader = package.GGUFReader(file, "r+")
    prefix = _prefix(reader)
    for name, value in wanted.items():
        if field := reader.fields.get(prefix + name):
            field.parts[field.data[0]][0] = value
    reader.data.flush()


def read_fields(package: Any, file: Path) -> Figures:
    """The file's metadata about its own architecture, by the names without it."""
    reader = package.GGUFReader(file)
    prefix = _prefix(reader)
    own = {name: field for name, field in reader.fields.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): field.contents() for name, field in own.items()}


def _prefix(reader: Any) -> str:
    return reader.fields["general.architecture"].contents() + "."


def require_layers(fields: Mapping[str, Any], form: Gguf, options: Sequence[str]) -> None:
    """Refuse a file whose layers are not those of the plan.

    Raises:
        UserError: names the layers that would be run as full ones.
    """
    found, wanted = form.switched(fields), [option != FULL for option in options]
    if found != wanted:
        raise UserError(
            f"the converter wrote another plan: llama.cpp would run layers {_full(found)} as full ones, the hybrid has "
            f"{_full(wanted)} of {len(wanted)}; nothing is kept, take a newer llama.cpp"
        )


def _full(switched: Sequence[bool]) -> str:
    return ", ".join(str(layer) for layer, other in enumerate(switched) if not other) or "none"


def require_fields(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a file without the required fields.

    Raises:
        UserError: names the field.
    """
    for name, value in wanted.items():
        if fields.get(name) != value:
            raise UserError(
                f"the converter wrote no field {name}, which must be {value}; nothing is kept, take a newer llama.cpp"
            )
