"""The progress of a stage in plain lines, for pipes, log files and CI jobs: at growing intervals, with time left."""

import math
import time
from collections.abc import Callable

from flashmorph.units import rough_time

_FIRST_SECONDS = (30.0, 60.0, 120.0, 300.0)
"""Since the start of a stage: a stage of seconds prints none."""
_LATER_SECONDS = 600.0


class ProgressLines:
    """When a stage prints a line, and its text.

    Args:
        stage: The stage's name, with which the line begins.
        clock: Gives seconds.
        about: What the stage is about, since several of a name follow each other (`evaluate`, model by model).
    """

    def __init__(self, stage: str, clock: Callable[[], float] = time.monotonic, about: str = ""):
        self._stage, self._clock, self._about = stage, clock, about
        self._began = self._since = clock()
        self._first: float | None = None
        self._last = -math.inf
        self._due = _next_line(0.0)

    def line(self, done: float, total: float, **figures: float) -> str | None:
        """The line that is due after `done` of `total` steps, with the newest figures; None where none is due.

        The time left is by the pace since the first report: a resumed stage does not start at 0. Where `done` falls,
        another part of the stage has begun (text is read before a model is trained), which has a pace of its own.
        """
        now = self._clock()
        if self._first is None or done < self._last:
            self._first, self._since = done, now
        self._last = done
        if (elapsed := now - self._began) < self._due:
            return None
        self._due = _next_line(elapsed)
        share = f"{100 * min(1.0, done / total):.0f} %" if total > 0 else ""
        counted = f" ({done:,.0f} of {total:,.0f})" if total > 1 else ""
        shown = " ".join(f"{label} {value:.3f}" for label, value in figures.items())
        spent = f"{rough_time(elapsed)} so far"
        if (left := self._left(done, total, now)) is not None:
            spent += f", {rough_time(left)} left"
        return f"{self._stage:<10} " + " · ".join(filter(None, (self._about, share + counted, shown, spent)))

    def _left(self, done: float, total: float, now: float) -> float | None:
        steps = done - (self._first or 0.0)
        return (now - self._since) * max(0.0, total - done) / steps if steps > 0 and total > 0 else None


def _next_line(elapsed: float) -> float:
    """When the next line is due, in seconds since the start of a stage."""
    return next((wait for wait in _FIRST_SECONDS if wait > elapsed), elapsed + _LATER_SECONDS)
