"""Charts as PNG, for papers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from flashmorph.records import Figures
from flashmorph.report.charts import Chart, Dots, Heat, Lines, Panel, Series
from flashmorph.surface.outputs import save_picture
from flashmorph.surface.terminal import harmless

_WIDE, _NARROW = 6.5, 4.2
_PER_ROW = 3
_MARKS = {"circle": "o", "diamond": "D", None: ""}
_DPI = 150


def draw(chart: Chart, path: Path) -> None:
    """Every panel of a chart in one picture, its title above and its legend below.

    Raises:
        UserError: a file cannot be written.
    """
    columns = min(_PER_ROW, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    width = _WIDE if columns == 1 else _NARROW * columns
    height = rows * max(map(_height, chart.panels))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        if index < len(chart.panels):
            _draw(axis, chart.panels[index])
        else:
            axis.set_axis_off()
    figure.suptitle(_plain(chart.title), fontsize=11)
    if legend := chart.legend:
        handles = [_handle(series) for series in legend]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(legend), 2 * columns), fontsize=7)
    save_picture(figure, path, dpi=_DPI)


def _plain(text: str) -> str:
    """Without formulas: matplotlib reads what stands between two dollars as one."""
    return harmless(text).replace("$", r"\$")


def _plain_all(texts: Sequence[str]) -> list[str]:
    return [_plain(text) for text in texts]


def _height(panel: Panel) -> float:
    if isinstance(panel, Heat):
        return 1.4 + 0.3 * len(panel.rows)
    if isinstance(panel, Dots):
        return 1.8 + 0.32 * len(panel.categories)
    return 4.0


def _draw(axis: Any, panel: Panel) -> None:
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axis.set_title(_plain(panel.title), fontsize=9)
    if isinstance(panel, Heat):
        _heat(axis, panel)
        return
    axis.grid(alpha=0.3)
    for series in panel.series:
        _errors(axis, panel, series)
    if isinstance(panel, Lines):
        _line_axes(axis, panel)
    else:
        axis.set_yticks(range(len(panel.categories)), _plain_all(panel.categories))
        axis.set_ylim(len(panel.categories) - 0.5, -0.5)
        if panel.x_range:
            low, high = panel.x_range
            axis.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
            if low < 0 < high:
                axis.axvline(0, color="grey", linewidth=0.8)


def _line_axes(axis: Any, panel: Lines) -> None:
    if panel.log_x:
        axis.set_xscale("log")
    if panel.log_y:
        axis.set_yscale("log")
    if panel.x_ticks:
        axis.set_xticks(list(panel.x_ticks), list(panel.x_ticks.values()))
        axis.xaxis.set_minor_locator(NullLocator())


def _errors(axis: Any, panel: Panel, series: Series) -> None:
    errors = None
    if series.low is not None and series.high is not None:
        middle = series.x if isinstance(panel, Dots) else series.y
        # Bootstrapped ends may fall short of the mean by a rounding error.
        errors = [
            [max(0.0, value - low) for value, low in zip(middle, series.low, strict=True)],
            [max(0.0, high - value) for value, high in zip(middle, series.high, strict=True)],
        ]
    line = "none" if isinstance(panel, Dots) else "--" if series.look.dashed else "-"
    axis.errorbar(
        series.x,
        series.y,
        **{"xerr" if isinstance(panel, Dots) else "yerr": errors},
        linestyle=line,
        **_style(series),
        elinewidth=1,
    )


def _style(series: Series) -> Figures:
    look = series.look
    inside = look.colour if look.filled else "white"
    return {"color": look.colour, "marker": _MARKS[look.mark], "markerfacecolor": inside, "markersize": 4.5}


def _handle(series: Series) -> Line2D:
    line = "--" if series.look.dashed else "-" if series.look.line else "none"
    return Line2D([], [], label=_plain(series.name), linestyle=line, **_style(series))


def _heat(axis: Any, panel: Heat) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in panel.values]
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(panel.columns)), _plain_all(panel.columns))
    axis.set_yticks(range(len(panel.rows)), _plain_all(panel.rows))
    for row, some in enumerate(panel.values):
        for column, value in enumerate(some):
            if value is not None:
                shade = "black" if value > 60 else "white"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=8)
