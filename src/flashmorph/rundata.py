"""The rows and questions of a run: tokenised once into its data folder, the splits kept apart."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flashmorph import ranks
from flashmorph.corpus import Corpus, Mixture, local_files
from flashmorph.progress import Report
from flashmorph.recipe import Recipe
from flashmorph.rows import Rows, pack
from flashmorph.run import Run
from flashmorph.runfolder import digest_of
from flashmorph.selection import NEED_TRAINING
from flashmorph.selection.search import own_settings
from flashmorph.selection.searchdata import SearchData, SearchSettings
from flashmorph.stages import TrainSettings, collate
from flashmorph.tasks import STYLES, Example, Haystack, Layout, TaskSettings, make_example


def open_layout(recipe: Recipe, corpus: Corpus | Mixture, tokenizer: PreTrainedTokenizerBase, split: str) -> Layout:
    """What lays problems out in the recipe's text of one split."""
    repeated = recipe.data.haystack == "repeated"
    haystack = Haystack.repeated() if repeated else Haystack(corpus.pool(split, recipe.seed))
    return Layout(tokenizer, STYLES[recipe.style], haystack)


def open_questions(
    recipe: Recipe,
    corpus: Corpus | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "test",
    number: int | None = None,
    length: int | None = None,
) -> dict[str, Sequence[Example]]:
    """The recipe's questions of one split, by task; as many and as long as its evaluation's unless told."""
    style, settings = STYLES[recipe.style], recipe.evaluate
    layout, length = open_layout(recipe, corpus, tokenizer, split), length or settings.length
    return {
        name: [
            make_example(task, layout, style, split, length, recipe.seed, question)
            for question in range(number or settings.questions)
        ]
        for name, task in recipe.tasks.items()
    }


def search_data(run: Run, judging: str, search: SearchSettings) -> SearchData:
    """The data of a search: batches of the split `train`, questions of the split `judging`."""
    recipe = run.recipe
    layouts = {split: open_layout(recipe, run.corpus, run.tokenizer, split) for split in ("train", judging)}
    return SearchData(layouts, STYLES[recipe.style], list(recipe.tasks.values()), search, recipe.seed)


def training_rows(run: Run, settings: TrainSettings, stage: str, report: Report) -> Rows:
    """Rows for one stage, tokenised once into the run's data folder: text, and retrieval questions where asked for."""
    return Rows(ranks.first(lambda: _pack_training_rows(run, settings, stage, report)))


def _pack_training_rows(run: Run, settings: TrainSettings, stage: str, report: Report) -> Path:
    recipe = run.recipe
    questions = round(settings.retrieval_share * settings.rows)
    tasks = list(recipe.tasks.values()) if questions else []
    wanted = {"train": [settings.length, settings.rows], **common_settings(run), "questions": [questions, recipe.style]}
    wanted["documents"] = "marked"  # Rows of earlier versions do not tell where documents begin.
    path = run.folder.data / f"{stage}-{digest_of([run.teacher.digest, wanted, plain(tasks)])}.npy"
    others = _Questions(run, settings.length, questions)
    passes = recipe.data.max_passes
    pack(run.corpus, run.tokenizer, "train", settings.length, settings.rows, recipe.seed, path, passes, report, others)
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
        return open_layout(self._run.recipe, self._run.corpus, self._run.tokenizer, "train")


def held_out_rows(run: Run, split: str, length: int, rows: int) -> Rows:
    """Text that no stage trains on, repeated where there is too little of it."""
    path = run.folder.data / f"{split}-{digest_of([run.teacher.digest, length, rows, common_settings(run)])}.npy"

    def tokenise() -> None:
        pack(run.corpus, run.tokenizer, split, length, rows, run.recipe.seed, path, None)

    ranks.first(tokenise)
    return Rows(path)


def calibration(run: Run, rows: Rows) -> dict[str, torch.Tensor]:
    """The rows that branches are started from, as a batch of the stage `align`."""
    numbers = range(min(run.recipe.calibration_rows, len(rows)))
    batch = collate([rows[row] for row in numbers], run.recipe.align.isolate_documents)
    batch.pop("loss_mask", None)  # Alignment has no targets.
    return batch


def common_settings(run: Run) -> dict[str, Any]:
    """What the digest of every stage with data depends on; local text by the names and sizes of its files too."""
    files = local_files(run.recipe.data.corpus)
    common = {"data": run.recipe.data.model_dump(mode="json"), "seed": run.recipe.seed, "bf16": run.bf16}
    return {**common, "files": digest_of(files)} if files else common


def task_settings(run: Run) -> dict[str, Any]:
    """What the digest of a stage that asks questions depends on."""
    return {"tasks": plain(run.recipe.tasks.values()), "style": run.recipe.style, **common_settings(run)}


def select_settings(run: Run) -> dict[str, Any]:
    """What the digest of a stage that searches depends on, the strategy's defaults written out."""
    chosen = run.recipe.select
    resolved = own_settings(chosen.strategy, chosen.settings)
    select = {"strategy": chosen.strategy, "settings": resolved, "search": chosen.search.model_dump(mode="json")}
    wanted = {"select": select, **task_settings(run)}
    if chosen.strategy in NEED_TRAINING:
        wanted["distill"] = _train_settings(run.recipe.distill)
    if run.left_out:
        wanted["left_out"] = list(run.left_out)
    return wanted


def training_settings(run: Run, settings: TrainSettings) -> dict[str, Any]:
    """What the digest of a stage that trains depends on."""
    about = task_settings(run) if settings.retrieval_share else common_settings(run)
    return {"train": _train_settings(settings), **about}


def row_settings(run: Run, settings: TrainSettings) -> dict[str, Any]:
    """What the digest of a stage depends on that only reads the rows of one that trains."""
    about = task_settings(run) if settings.retrieval_share else common_settings(run)
    names = ("length", "rows", "retrieval_share", "isolate_documents")
    return {**{name: getattr(settings, name) for name in names}, **about}


def _train_settings(settings: TrainSettings) -> dict[str, Any]:
    """As JSON values. `isolate_documents` is left out where it is off: what was trained before there was such a setting
    keeps its digest. What only trades time for memory is left out."""
    left_out = {"activation_checkpointing", *(() if settings.isolate_documents else ("isolate_documents",))}
    return settings.model_dump(mode="json", exclude=left_out)


def plain(tasks: Iterable[TaskSettings]) -> list[dict[str, Any]]:
    """Tasks as JSON values."""
    return [task.model_dump(mode="json") for task in tasks]
