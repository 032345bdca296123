"""Progress reporting: long-running work calls a `Report`; the command line decides how progress is shown."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

_LOG = logging.getLogger(__name__)


class Report(Protocol):
    """Called with the steps done, all steps, and the figures worth showing, such as `loss`."""

    def __call__(self, done: float, total: float, /, **figures: float) -> None:
        """Show the progress."""
        ...


def continued(report: Report, done: float, total: float) -> Report:
    """A `Report` of one part of the work: its steps count from `done` on, out of the `total` of all parts."""

    def of_part(step: float, steps: float, **figures: float) -> None:
        report(done + step, total, **figures)

    return of_part


def spread_report(report: Report, ranks: int, total: float) -> Report:
    """A `Report` of work that `ranks` ranks share evenly, by what this one has done of it."""

    def of_all(done: float, _: float = 0, **figures: float) -> None:
        report(min(total, done * ranks), total, **figures)

    return of_all


def silent(done: float, total: float, **figures: float) -> None:
    """A `Report` that shows nothing."""


class Screen(Protocol):
    """Where a run or an evaluation shows what it does."""

    def stage(self, name: str, about: str) -> AbstractContextManager[Report]:
        """Show a running stage; its progress goes to the report."""
        ...

    def done(self, stage: Any, about: str, figures: str) -> None:
        """Show a stage (`run.folder.Stage`) that has finished, now or in an earlier run."""
        ...

    def say(self, text: str) -> None:
        """Show a line."""
        ...


class Logged:
    """A `Screen` without a terminal: progress is not shown, and what a user should know goes to logging."""

    @contextmanager
    def stage(self, name: str, about: str) -> Iterator[Report]:
        """Log the beginning of a stage, at level INFO."""
        _LOG.info("%s: %s", name, about)
        yield silent

    def done(self, stage: Any, about: str, figures: str) -> None:
        """Log the end of a stage, at level INFO."""
        _LOG.info("%s: %s: %s", stage.name, about, figures)

    def say(self, text: str) -> None:
        """Log a line, as a warning."""
        _LOG.warning("%s", text)
