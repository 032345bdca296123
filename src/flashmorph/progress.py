"""How long work tells how far it is. Stages call a `Report`; what a person sees is the command line's business."""

from typing import Protocol


class Report(Protocol):
    """Called with the steps done, all steps, and the figures worth showing, such as `loss`."""

    def __call__(self, done: float, total: float, /, **figures: float) -> None:
        """Show the progress."""
        ...


def silent(done: float, total: float, **figures: float) -> None:
    """Shows nothing."""
