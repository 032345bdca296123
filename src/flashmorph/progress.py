"""Progress reporting: long-running work calls a `Report`; the command line decides how progress is shown."""

from typing import Protocol


class Report(Protocol):
    """Called with the steps done, all steps, and the figures worth showing, such as `loss`."""

    def __call__(self, done: float, total: float, /, **figures: float) -> None:
        """Show the progress."""
        ...


def silent(done: float, total: float, **figures: float) -> None:
    """A `Report` that shows nothing."""
