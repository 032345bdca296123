"""The rows and questions of a run: tokenised once into its data folder, the splits kept apart."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flashmorph import distributed
from flashmorph.data.heldout import HeldOut, hold_out
from flashmorph.data.rows import Rows, pack
from flashmorph.errors import UserError
from flashmorph.files import digest_of
from flashmorph.progress import Report
from flashmorph.recipe.questions import open_layout
from flashmorph.run.digests import learns_ends, row_settings, text_settings
from flashmorph.run.pools import Pools
from flashmorph.run.run import Run
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.stages import TrainSettings, collate
from flashmorph.tasks import STYLES, Layout, make_example


def search_data(run: Run, judging: str, search: SearchSettings) -> SearchData:
    """The data of a search: batches of the split `train`, questions of the split `judging`."""
    recipe = run.recipe
    layouts = {split: open_layout(recipe, Pools(run), run.tokenizer, split) for split in ("train", judging)}
    return SearchData(layouts, STYLES[recipe.style], list(recipe.tasks.values()), search, recipe.seed)


def training_rows(run: Run, settings: TrainSettings, stage: str, report: Report) -> Rows:
    """Rows for one stage, tokenised once into the run's data folder: text, and retrieval questions where asked for."""
    return Rows(distributed.first(lambda: _pack_training_rows(run, settings, stage, report)))


def _pack_training_rows(run: Run, settings: TrainSettings, stage: str, report: Report) -> Path:
    recipe = run.recipe
    path = run.folder.data / f"{stage}-{digest_of(row_settings(run, settings))}.npy"
    others = _Questions(run, settings.length, settings.questions)
    passes = recipe.data.max_passes
    pack(
        run.corpus,
        run.tokenizer,
        "train",
        settings.length,
        settings.rows,
        recipe.seed,
        path,
        passes,
        report,
        others,
        settings.takes_long_documents,
        learns_ends(run, settings),
    )
    return path


class _Questions(Sequence[list[int]]):
    """Rows that are retrieval questions of the split `train`, each made when it is asked for."""

    def __init__(self, run: Run, length: int, number: int):
        self._run, self._length, self._number = run, length, number
        self._tasks = list(run.recipe.tasks.values())

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, row: Any) -> Any:
        recipe, task = self._run.recipe, self._tasks[row % len(self._tasks)]
        return make_example(task, self._layout, STYLES[recipe.style], "train", self._length, recipe.seed, row).input_ids

    @cached_property
    def _layout(self) -> Layout:
        return open_layout(self._run.recipe, Pools(self._run), self._run.tokenizer, "train")


def held_out_text(run: Run, split: str, length: int, tokens: int, long_documents: bool = False) -> HeldOut:
    """Text that no stage trains on, tokenised once into the run's data folder: `tokens` of it, or all that there is."""
    long = ["long documents"] if long_documents else []
    path = run.folder.data / f"{split}-{digest_of([length, tokens, text_settings(run), *long])}.npz"

    def tokenise() -> None:
        try:
            HeldOut.load(path)
        except UserError as error:
            if path.exists():
                run.screen.say(f"{error}; making it again")
            hold_out(run.corpus, run.tokenizer, split, length, tokens, run.recipe.seed, long_documents).save(path)

    distributed.first(tokenise)
    return HeldOut.load(path)


def calibration(run: Run, rows: Rows) -> dict[str, torch.Tensor]:
    """The rows that branches are started from, as a batch of the stage `align`."""
    numbers = range(min(run.recipe.calibration_rows, len(rows)))
    batch = collate([rows[row] for row in numbers], run.recipe.align.keeps_apart)
    batch.pop("loss_mask", None)  # Alignment has no targets.
    return batch
