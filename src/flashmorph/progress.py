"""Progress reporting: long-running work calls a `Report`; the command line decides how progress is shown."""

from typing import Protocol


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


def silent(done: float, total: float, **figures: float) -> None:
    """A `Report` that shows nothing."""
