"""The teacher's largest logits on disk: written once, read by every distillation of a run instead of a teacher.

For teachers that do not fit next to their student.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from flashmorph.data.isolation import apart, token_order
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.files import is_whole_array, write_json
from flashmorph.hosts import host_of, supports_varlen
from flashmorph.inputs.settings import Many, Settings
from flashmorph.inputs.shapes import Count, read_as
from flashmorph.losses import Head, chunk_tokens, top_log_probabilities
from flashmorph.progress import Report, silent
from flashmorph.stages.training import TrainSettings, collate

_VALUES, _PLACES, _WRITTEN = "log_probabilities.npy", "places.npy", "rows_written.json"
_WRITE_SECONDS = 20


class LogitSettings(Settings):
    """What is kept of the teacher: the log-probabilities of each token's `top_k` likeliest next tokens."""

    top_k: Many = 64


def logits_on_disk(settings: TrainSettings, top_k: int) -> str:
    """In words, for each token `top_k` log-probabilities and that of the rest in float32, and their places."""
    each = 4 * (top_k + 1) + 4 * top_k
    return f"{settings.tokens_run:,} tokens of {each:,} bytes: {settings.tokens_run * each / 2**30:,.2f} GiB on disk"


class RowsWithLogits(Dataset[dict[str, Any]]):
    """Rows, each with what the teacher says of its tokens: `values` `[length, k + 1]` and `places` `[length, k]`.

    Both are mapped from the files in `folder` and read as they are needed.
    """

    def __init__(self, rows: Rows, folder: Path):
        self._rows = rows
        self._values = np.load(folder / _VALUES, mmap_mode="r")
        self._places = np.load(folder / _PLACES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self._rows[row], "values": np.array(self._values[row]), "places": self._places[row].astype(np.int64)}


@torch.no_grad()
def write_logits(
    teacher: PreTrainedModel,
    rows: Rows,
    settings: TrainSettings,
    top_k: int,
    folder: Path,
    bf16: bool = False,
    report: Report = silent,
) -> None:
    """Run `teacher` over `rows` and keep its likeliest tokens in `folder`; interrupted work goes on where it stopped.

    The space on disk is taken before the first row.

    Raises:
        UserError: `top_k` is more than the vocabulary.
        OSError: there is no room.
    """
    vocabulary = teacher.config.vocab_size
    if top_k > vocabulary:
        raise UserError(
            f"distill.teacher_logits.top_k is {top_k:,}; the teacher's vocabulary has {vocabulary:,} tokens"
        )
    shapes = (len(rows), settings.length, top_k + 1), (len(rows), settings.length, top_k)
    done = _rows_written(folder, *shapes)
    values = _mapped(folder / _VALUES, shapes[0], np.float32, new=not done)
    places = _mapped(folder / _PLACES, shapes[1], np.uint32, new=not done)
    at_once = settings.division(1).rows
    kept_at = time.perf_counter()
    while done < len(rows):
        number = min(at_once, len(rows) - done)
        batch = collate([rows[row] for row in range(done, done + number)], settings.keeps_apart)
        batch.pop("loss_mask", None)  # Every token's are kept, in their places.
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
            found = _of_batch(teacher, **{name: each.to(teacher.device) for name, each in batch.items()}, top_k=top_k)
        values[done : done + number], places[done : done + number] = (each.cpu().numpy() for each in found)
        done += number
        if done == len(rows) or time.perf_counter() - kept_at > _WRITE_SECONDS:
            values.flush()
            places.flush()
            write_json(folder / _WRITTEN, done)
            kept_at = time.perf_counter()
        report(done, len(rows))


def _rows_written(folder: Path, values: tuple[int, ...], places: tuple[int, ...]) -> int:
    """The rows that interrupted work can go on behind: none where its files are not whole."""
    try:
        done = read_as(folder / _WRITTEN, Count)
    except UserError:
        return 0
    whole = is_whole_array(folder / _VALUES, values, np.float32) and is_whole_array(folder / _PLACES, places, np.uint32)
    return done if whole and done <= values[0] else 0


def _of_batch(
    teacher: PreTrainedModel, input_ids: torch.Tensor, starts: torch.Tensor | None = None, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of the tokens of `input_ids` `[batch, time]`, in their places: `[batch, time, k + 1]` and `k`."""
    varlen, head = supports_varlen(host_of(teacher.config), input_ids.device), Head.of(teacher)
    hidden = torch.cat([each.run(teacher.model) for each in apart(input_ids, starts, varlen)])
    order = token_order(input_ids, starts, varlen)
    parts = [top_log_probabilities(head(part), top_k) for part in hidden.split(chunk_tokens(head.out_features))]
    kept = (torch.cat(part) for part in zip(*parts, strict=True))
    values, places = (torch.empty_like(each).index_copy_(0, order, each).unflatten(0, input_ids.shape) for each in kept)
    return values, places


def _mapped(path: Path, shape: tuple[int, ...], dtype: type, new: bool) -> np.memmap:
    """An array in the file `path`, all of its space taken: to write through a map where there is none is fatal."""
    if not new:
        return np.lib.format.open_memmap(path, mode="r+")
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array
