"""The teacher's largest logits on disk: written once, then read by every distillation of a run instead of a teacher.

For teachers that do not fit beside their student.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from flashmorph import distributed
from flashmorph.data.isolation import apart, token_order
from flashmorph.data.rows import Rows
from flashmorph.errors import UserError
from flashmorph.files import is_whole_array, write_json
from flashmorph.hosts import host_of, supports_varlen
from flashmorph.hosts.parts import decoder_of
from flashmorph.inputs.settings import Many, Settings
from flashmorph.inputs.shapes import Count, read_as
from flashmorph.losses import Head, chunk_tokens, top_log_probabilities
from flashmorph.progress import Report, silent
from flashmorph.records import Figures
from flashmorph.stages.settings import TrainSettings
from flashmorph.stages.training import collate
from flashmorph.units import byte_size

_VALUES, _INDICES, _WRITTEN = "log_probabilities.npy", "places.npy", "rows_written.json"
_WRITE_SECONDS = 20


class LogitSettings(Settings):
    """How much is stored of the teacher: the log-probabilities of the `top_k` likeliest next tokens of each token."""

    top_k: Many = 64


def logits_on_disk(settings: TrainSettings, top_k: int) -> str:
    """The size on disk in words: per token, `top_k + 1` log-probabilities (float32) and `top_k` indices (uint32)."""
    each = 4 * (top_k + 1) + 4 * top_k
    return f"{settings.tokens_run:,} tokens of {each:,} bytes: {byte_size(settings.tokens_run * each)} on disk"


class RowsWithLogits(Dataset[dict[str, Any]]):
    """Rows, each with the teacher's log-probabilities of its tokens.

    `values` `[length, k + 1]` are the k largest and that of the rest, `indices` `[length, k]` those tokens in the
    vocabulary. Both are memory-mapped from the files in `folder`.
    """

    def __init__(self, rows: Rows, folder: Path):
        self._rows = rows
        self._values = np.load(folder / _VALUES, mmap_mode="r")
        self._indices = np.load(folder / _INDICES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Figures:
        return {
            **self._rows[row],
            "values": np.array(self._values[row]),
            "indices": self._indices[row].astype(np.int64),
        }


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
    """Run `teacher` over `rows` and store its likeliest tokens in `folder`; an interrupted call continues there.

    The space on disk is allocated before the first row. Ranks run their share of the rows and write them into the same
    files.

    Args:
        teacher: On the device that it runs on.
        rows: The rows that a distillation trains on.
        settings: Of that distillation: length of a row in tokens, micro-batch size, document isolation.
        top_k: Log-probabilities stored per token, besides that of the rest.
        folder: Where the arrays and the number of finished rows are written.
        bf16: Whether forwards run under bfloat16 autocast.
        report: Called with the rows done and all rows.

    Raises:
        UserError: `top_k` is more than the vocabulary.
        OSError: the disk is too small.
    """
    vocabulary = teacher.config.vocab_size
    if top_k > vocabulary:
        raise UserError(
            f"distill.teacher_logits.top_k is {top_k:,}; the teacher's vocabulary has {vocabulary:,} tokens"
        )
    shapes = (len(rows), settings.length, top_k + 1), (len(rows), settings.length, top_k)
    done = distributed.first(lambda: _prepare(folder, *shapes))
    values, indices = (np.lib.format.open_memmap(folder / name, mode="r+") for name in (_VALUES, _INDICES))
    at_once, rank = settings.division(1).rows, distributed.rank() if distributed.count() > 1 else 0
    kept_at = time.perf_counter()
    while done < len(rows):
        start = done + rank * at_once
        if batch_rows := [rows[row] for row in range(start, min(start + at_once, len(rows)))]:
            batch = collate(batch_rows, settings.keeps_apart)
            batch.pop("loss_mask", None)  # Logits are stored for every token.
            own = {name: each.to(teacher.device) for name, each in batch.items()}
            with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
                logits = _of_batch(teacher, **own, top_k=top_k)
            part = slice(start, start + len(batch_rows))
            values[part], indices[part] = (each.cpu().numpy() for each in logits)
        done = min(done + at_once * distributed.count(), len(rows))
        if done == len(rows) or distributed.gather(time.perf_counter() - kept_at > _WRITE_SECONDS)[0]:
            values.flush()
            indices.flush()
            distributed.wait()
            distributed.first(lambda done=done: write_json(folder / _WRITTEN, done))
            kept_at = time.perf_counter()
        report(done, len(rows))


def _prepare(folder: Path, values: tuple[int, ...], indices: tuple[int, ...]) -> int:
    """Allocate the files of these shapes where they are not there. Returns the number of rows that they have."""
    done = _rows_written(folder, values, indices)
    if not done:
        _allocate(folder / _VALUES, values, np.float32)
        _allocate(folder / _INDICES, indices, np.uint32)
    return done


def _rows_written(folder: Path, values: tuple[int, ...], indices: tuple[int, ...]) -> int:
    """The number of rows that an interrupted call has finished; 0 if its files, of these shapes, are incomplete."""
    try:
        done = read_as(folder / _WRITTEN, Count)
    except UserError:
        return 0
    files = ((_VALUES, values, np.float32), (_INDICES, indices, np.uint32))
    whole = all(is_whole_array(folder / name, shape, dtype) for name, shape, dtype in files)
    return done if whole and done <= values[0] else 0


def _of_batch(
    teacher: PreTrainedModel, input_ids: torch.Tensor, starts: torch.Tensor | None = None, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[batch, time, k + 1]` and indices `[batch, time, k]` for `input_ids` `[batch, time]`."""
    varlen, head = supports_varlen(host_of(teacher.config), input_ids.device), Head.of(teacher)
    hidden = torch.cat([each.run(decoder_of(teacher)) for each in apart(input_ids, starts, varlen)])
    order = token_order(input_ids, starts, varlen)
    at_once = chunk_tokens(head.out_features, hidden.device.type)
    parts = [top_log_probabilities(head(part), top_k) for part in hidden.split(at_once)]
    kept = (torch.cat(part) for part in zip(*parts, strict=True))
    values, indices = (
        torch.empty_like(each).index_copy_(0, order, each).unflatten(0, input_ids.shape) for each in kept
    )
    return values, indices


def _allocate(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """A preallocated array in the file `path`: writing to a memory map on a full disk kills the process (SIGBUS)."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
