"""The folder of a run: one folder a stage, named by the digest of its settings and inputs, never changed once done.

A stage works in `stages/<name>-<digest>.partial` and is renamed when it is finished, so a folder without that ending
was whole once; its record lists its files, and each use compares them. The same digest means the same result: such a
stage is not run again, also if it is in another run's folder.
Rank 0 holds the lock and writes; it broadcasts the records to the other ranks.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.files import atomic_path, digest_of, is_temporary, read_json, write_json, writing
from flashmorph.inputs.shapes import Finite, read_as
from flashmorph.records import Figures
from flashmorph.run.marker import MARKER, Owner, last_stages, mark, note_stage, note_teacher, require_same_teacher
from flashmorph.run.wholeness import CHECKPOINTS, damage, listing
from flashmorph.versions import versions

RECIPE = "recipe.yaml"
"""The recipe of the folder's stages: of the published result, or else of the last command that made some."""
STAGES = "stages"
_WRITTEN = (STAGES, "data", "compare", "figures")
"""The folders in a run's folder that runs write into."""
_PARTIAL = ".partial"
_RECORD, _SPENT = "stage.json", "spent.json"


def _holds_anything(folder: Path) -> bool:
    """Whether there is more in a folder than what a run leaves that was killed in its first moments."""
    return any(not is_temporary(path) for path in folder.iterdir())


def _leftovers(folder: Path) -> list[Path]:
    """Partial files of a killed run: by the exact form of their names, and only where runs write."""
    below = [path for name in _WRITTEN for path in (folder / name).rglob("*")]
    return [path for path in (*folder.iterdir(), *below) if is_temporary(path)]


@dataclass(frozen=True)
class Stage:
    """One stage's result: its folder, digest and record (settings, inputs, versions, seconds, figures)."""

    name: str
    digest: str
    folder: Path
    record: Figures = field(default_factory=dict)
    reused: bool = False


def require_runs(path: Path, others: Iterable[Path]) -> None:
    """Check the folder of a run and those of earlier ones, without touching any.

    Raises:
        UserError: `path` holds something else, or one of `others` is no run.
    """
    for other in others:
        if not (other / STAGES).is_dir():
            raise UserError(f"{other} is no run of flashmorph's: it has no folder {STAGES!r}")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder that is new, empty or a run of flashmorph's")
    if path.is_dir() and _holds_anything(path) and not (path / MARKER).is_file():
        raise UserError(f"{path} holds something else; give a folder that is new, empty or a run of flashmorph's")


class RunFolder:
    """`path`, with earlier runs in `others` whose finished stages may be used; of one `teacher`, where it is known."""

    def __init__(self, path: Path, others: tuple[Path, ...] = (), teacher: Owner | None = None):
        """Claim the folder.

        Raises:
            UserError: it holds something else or a run of another teacher, cannot be written, another run is at work in
                it, or one of `others` is no run.
        """
        self.path, self._teacher = path, teacher
        self._stage_folders = [run / STAGES for run in (path, *others)]
        distributed.first(self._claim)

    def _claim(self) -> None:
        path = self.path
        require_runs(path, [stages.parent for stages in self._stage_folders[1:]])
        if self._teacher:
            require_same_teacher(path, self._teacher)
        mark(path)
        try:
            (path / STAGES).mkdir(exist_ok=True)
            (path / "data").mkdir(exist_ok=True)
            self._lock = FileLock(path / ".lock", timeout=0)
            self._lock.acquire()
            if self._teacher:
                note_teacher(path, self._teacher)
            for finished in (path / STAGES).glob(f"*/{_RECORD}"):
                if finished.parent.suffix != _PARTIAL:
                    shutil.rmtree(finished.parent / CHECKPOINTS, ignore_errors=True)
            # Left by a run that was killed while it wrote; resumable state has other names.
            for leftover in _leftovers(path):
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        except Timeout as error:
            raise UserError(f"another run is at work in {path}: wait for it, or give another --output") from error
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def release(self) -> None:
        """Let go of the folder; a run that ends does so too."""
        if distributed.is_first():
            self._lock.release()

    @property
    def data(self) -> Path:
        """The folder of tokenised rows."""
        return self.path / "data"

    def keep_recipe(self, text: str) -> None:
        """Write the recipe of what is made here; what is published already keeps its own until it is published anew."""

        def write() -> None:
            if not (self.path / "results.json").is_file():
                with atomic_path(self.path / RECIPE) as temporary:
                    temporary.write_text(text, encoding="utf-8")

        distributed.first(write)

    def find(self, name: str, settings: Any, inputs: list[str]) -> Stage | None:
        """The finished stage with these settings and inputs, here or in another run.

        Raises:
            UserError: it is there and is not what it was when it was finished.
        """
        digest = digest_of([name, settings, inputs])

        def look() -> Stage | None:
            for stages in self._stage_folders:
                folder = stages / f"{name}-{digest}"
                if folder.is_dir():
                    return Stage(name, digest, folder, self._whole_record(folder, digest), reused=True)
            return None

        return distributed.first(look)

    def _whole_record(self, folder: Path, digest: str) -> Figures:
        """The record of a finished stage whose files are all as they were."""
        try:
            record = read_json(folder / _RECORD)
            problem = damage(folder, record, digest)
        except UserError as error:
            record, problem = {}, str(error)
        if problem:
            own = folder.parent == self._stage_folders[0]
            way_out = "" if own else f", or leave out --from {folder.parent.parent}"
            raise UserError(f"{folder} is damaged: {problem}; remove that folder, and the stage runs again{way_out}")
        return record

    def last(self, label: str) -> str | None:
        """The folder that the last run used for what it called `label`."""
        return distributed.first(lambda: last_stages(self.path).get(label))

    def why_again(self, before: str, name: str, settings: Any, inputs: list[str]) -> str:
        """Why `before`, which the last run used, does not do for a stage that is not found."""
        if before == f"{name}-{digest_of([name, settings, inputs])}":
            return f"{before} is not here and in no run that --from names"
        return f"settings or inputs differ from {before}, which stays"

    def remember(self, label: str, stage: Stage) -> None:
        """Note which folder this run uses for `label`."""

        distributed.first(lambda: note_stage(self.path, label, stage.folder.name))

    def run(self, name: str, settings: Any, inputs: list[str], work: Callable[[Path], dict[str, Any] | None]) -> Stage:
        """Do `work(folder)` unless it is done already, and keep what it returns in the stage's record.

        Every process does it. Interrupted work finds its own files in `folder` again.
        """
        if done := self.find(name, settings, inputs):
            return done
        digest = digest_of([name, settings, inputs])
        final = self._stage_folders[0] / f"{name}-{digest}"
        partial = final.with_name(final.name + _PARTIAL)

        def begin() -> float:
            with writing(partial, within=partial):
                partial.mkdir(parents=True, exist_ok=True)
                (partial / _RECORD).unlink(missing_ok=True)
            return _seconds_before(partial)

        def finish() -> Stage:
            record = {"stage": name, "digest": digest, "settings": settings, "inputs": inputs, "seconds": seconds}
            record |= {"versions": versions(), **figures}
            with writing(partial, within=partial):
                write_json(partial / _RECORD, {**record, "files": listing(partial)})
                return arrive()

        def arrive() -> Stage:
            # A stage is finished once its folder is renamed: until then a killed one resumes from its checkpoints.
            os.replace(partial, final)
            for leftover in (CHECKPOINTS, _SPENT):
                _remove(final / leftover)
            return Stage(name, digest, final, read_json(final / _RECORD))

        if distributed.first(lambda: _is_finished(partial)):
            with writing(partial, within=partial):
                return distributed.first(arrive)
        started, spent = time.perf_counter(), distributed.first(begin)
        try:
            with writing(partial, within=partial):
                figures = {"processes": distributed.count(), **(work(partial) or {})}
        finally:
            seconds = spent + time.perf_counter() - started
            if distributed.is_first():
                # On a full disk this fails too, and must not replace the error of the work: only seconds are lost.
                with suppress(UserError):
                    write_json(partial / _SPENT, seconds)
        return distributed.first(finish)


def _is_finished(partial: Path) -> bool:
    """Whether a stage was killed between its record and its rename."""
    try:
        record = read_json(partial / _RECORD)
    except UserError:
        return False
    return not damage(partial, record)


def _seconds_before(partial: Path) -> float:
    """Seconds that interrupted work has taken so far; 0 if they were not recorded."""
    try:
        seconds = read_as(partial / _SPENT, Finite)
    except UserError:
        return 0.0
    return max(0.0, seconds)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
