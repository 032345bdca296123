"""Checkpoints of several files, read tensor by tensor and written file by file: never in memory as a whole."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from flashmorph.convert.checkpoint import CONFIG, weight_files
from flashmorph.errors import UserError, first_line
from flashmorph.files import read_json, write_json

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that weights are computed with as they are stored, by the names that safetensors gives them."""


class ShardReader:
    """The weights in `folder`: those of `model.safetensors`, or of the files that its index names.

    `dtypes` has the name of every tensor and its dtype, as safetensors calls it (`BF16`).
    """

    def __init__(self, folder: Path):
        """Read names and dtypes, nothing else.

        Raises:
            UserError: no weights, or a file of the index is missing or damaged.
        """
        self.files = weight_files(folder)
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        try:
            with _opened(self.files) as handles:
                for file, handle in handles.items():
                    self._file_of |= dict.fromkeys(handle.keys(), file)
                    self.dtypes |= {name: handle.get_slice(name).get_dtype() for name in handle.keys()}
        except Exception as error:
            raise unreadable(folder, error) from error

    @property
    def main_dtype(self) -> torch.dtype | None:
        """The dtype of most numbers; None if no weight is in floating point of 16 bits or more."""
        numbers: Counter[torch.dtype] = Counter()
        with self.slices(name for name, dtype in self.dtypes.items() if dtype in FLOATS) as slices:
            for name, each in slices.items():
                numbers[FLOATS[self.dtypes[name]]] += math.prod(each.get_shape())
        return numbers.most_common(1)[0][0] if numbers else None

    @property
    def largest_bytes(self) -> int:
        """The size of the largest file."""
        return max(file.stat().st_size for file in self.files)

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """These tensors, each read when it is indexed; only their files are open, and only inside this context."""
        wanted = {name: self._file_of[name] for name in names}
        with _opened(set(wanted.values())) as handles:
            yield {name: handles[file].get_slice(name) for name, file in wanted.items()}


@contextmanager
def _opened(files: Iterable[Path]) -> Iterator[dict[Path, Any]]:
    # Read, not mapped: pages of a mapped file count as this process's memory for as long as it is open.
    with ExitStack() as stack:
        yield {file: stack.enter_context(safe_open(file, "pt", backend="pread")) for file in files}


class ShardWriter:
    """Writes a checkpoint into `folder`, in one file, or in files of at most `shard_bytes` or one tensor each."""

    def __init__(self, folder: Path, shard_bytes: int | None):
        self._folder, self._shard_bytes = folder, shard_bytes or sys.maxsize
        self._waiting: dict[str, torch.Tensor] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._parameters, self._bytes = 0, 0

    def add(self, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Add tensors, rounded to `dtype`; they are copied, and written once a file is full."""
        for name, tensor in state.items():
            size = tensor.numel() * dtype.itemsize
            if self._waiting and _bytes_of(self._waiting) + size > self._shard_bytes:
                self._write()
            self._waiting[name] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
            self._parameters, self._bytes = self._parameters + tensor.numel(), self._bytes + size

    def finish(self) -> None:
        """Write the remaining weights, name the files by their number, and write the index if there are several."""
        self._write()
        if len(self._written) == 1:
            self._written[0][0].rename(self._folder / SAFE_WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, 1):
            stem, ending = SAFE_WEIGHTS_NAME.rsplit(".", 1)
            final = f"{stem}-{number:05d}-of-{len(self._written):05d}.{ending}"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        metadata = {"total_parameters": self._parameters, "total_size": self._bytes}
        write_json(self._folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})

    def _write(self) -> None:
        path = self._folder / f"{len(self._written)}.safetensors.part"
        save_file(self._waiting, path, {"format": "pt"})
        self._written.append((path, list(self._waiting)))
        self._waiting = {}


def unreadable(folder: Path, error: Exception) -> UserError:
    """Why the weights in `folder` cannot be read, in one sentence."""
    return UserError(f"the weights in {folder} cannot be read, are they complete? {first_line(error)}")


def _bytes_of(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def require_whole(model: Path) -> None:
    """Open a checkpoint, without reading its weights.

    Raises:
        UserError: files are missing, or a file of weights was cut.
    """
    read_json(model / CONFIG)
    ShardReader(model)


def is_whole(model: Path) -> bool:
    """Whether there is a checkpoint in `model` that can be opened."""
    try:
        require_whole(model)
    except UserError:
        return False
    return True
