"""Charts as data. Two hands draw them: `interactive.py` for the page, `still.py` for papers.

Every panel must name both of its axes. Texts are plain, with line breaks: each hand quotes them for what it writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flashmorph.report.looks import Look


@dataclass(frozen=True)
class Series:
    """Figures of one thing: `y` over `x`; intervals `low`, `high` where there are any; `hover` a text a point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: Look
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    hover: Sequence[str] | None = None
    listed: bool = True


@dataclass(frozen=True)
class Lines:
    """Lines over a number."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    x_ticks: dict[float, str] | None = None


@dataclass(frozen=True)
class Dots:
    """A line a category, the first on top; in a series `x` are the figures and `y` the numbers of their categories."""

    title: str
    x_label: str
    y_label: str
    categories: list[str]
    series: list[Series]
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Heat:
    """Percent by row and column, None where nothing was asked; `hover` as `values`."""

    title: str
    x_label: str
    y_label: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    hover: list[list[str]]


Panel = Lines | Dots | Heat


@dataclass(frozen=True)
class Chart:
    """Panels that are read together, under one title; `name` is the file's, `note` what must be known to read it."""

    name: str
    title: str
    note: str
    panels: list[Panel] = field(default_factory=list)

    @property
    def legend(self) -> list[Series]:
        """Each name once."""
        by_name: dict[str, Series] = {}
        for panel in self.panels:
            if not isinstance(panel, Heat):
                for series in panel.series:
                    if series.listed:
                        by_name.setdefault(series.name, series)
        return list(by_name.values())
