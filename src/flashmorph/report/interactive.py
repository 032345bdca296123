"""Panels as plotly figures. Colours of text and grid belong to the page, which knows whether it is light or dark."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from flashmorph.records import Figures
from flashmorph.report.charts import Dots, Heat, Lines, Panel, Series
from flashmorph.surface.terminal import harmless

_ROW = 30
_HEIGHT = 330
_AROUND = 96


def spec(panel: Panel) -> Figures:
    """Data and layout for `Plotly.newPlot`."""
    figure = go.Figure(_TRACES[type(panel)](panel))
    figure.update_layout(
        template=None,
        height=_height(panel),
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        dragmode=False,
        hovermode="closest",
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    # A finger that scrolls the page must not zoom into a figure.
    figure.update_xaxes(title={"text": panel.x_label, "standoff": 8}, automargin=True, fixedrange=True, zeroline=False)
    figure.update_yaxes(title={"text": panel.y_label, "standoff": 8}, automargin=True, fixedrange=True, zeroline=False)
    _AXES[type(panel)](figure, panel)
    return json.loads(figure.to_json() or "{}")


def _plain(texts: Sequence[str]) -> list[str]:
    """As plotly shows them: it reads a few tags in every text."""
    return [escape(harmless(text), quote=False).replace("\n", "<br>") for text in texts]


def _height(panel: Panel) -> int:
    if isinstance(panel, Heat):
        return _AROUND + _ROW * len(panel.rows)
    if isinstance(panel, Dots):
        per_row = max(_ROW - 8, 11 * max(1, _most_in_a_row(panel)))
        return _AROUND + per_row * len(panel.categories)
    return _HEIGHT


def _most_in_a_row(panel: Dots) -> int:
    rows = [round(row) for series in panel.series for row in series.y]
    return max((rows.count(row) for row in set(rows)), default=1)


def _error(series: Series, middle: list[float]) -> Figures | None:
    if series.low is None or series.high is None:
        return None
    above = [high - value for high, value in zip(series.high, middle, strict=True)]
    below = [value - low for low, value in zip(series.low, middle, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 0}


def _scatter(series: Series, mode: str, error_axis: str, values: list[float]) -> go.Scatter:
    look = series.look
    symbol = (look.mark or "circle") + ("" if look.filled else "-open")
    return go.Scatter(
        x=list(series.x),
        y=list(series.y),
        name=_plain([series.name])[0],
        mode=mode,
        line={"color": look.colour, "width": 1.8, "dash": "dash" if look.dashed else "solid"},
        marker={"color": look.colour, "symbol": symbol, "size": 8, "line": {"width": 1.6, "color": look.colour}},
        text=_plain(series.hover) if series.hover else None,
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>" if series.look.mark is None else None,
        hoverinfo="text" if series.hover else "x+y+name",
        **{error_axis: _error(series, values)},
    )


def _lines(panel: Lines) -> list[go.Scatter]:
    return [
        _scatter(series, "lines+markers" if series.look.mark else "lines", "error_y", list(series.y))
        for series in panel.series
    ]


def _line_axes(figure: go.Figure, panel: Lines) -> None:
    if panel.log_x:
        figure.update_xaxes(type="log")
    if panel.log_y:
        figure.update_yaxes(type="log", tickformat="~g", dtick=1 if _decades(panel, "y") > 1 else None)
    if panel.x_ticks:
        figure.update_xaxes(tickvals=list(panel.x_ticks), ticktext=list(panel.x_ticks.values()))
    elif panel.log_x and _decades(panel, "x") > 1:
        figure.update_xaxes(exponentformat="power", dtick=1)
    elif panel.log_x:
        figure.update_xaxes(tickformat="~s")


def _decades(panel: Lines, axis: str) -> float:
    """The powers of ten that the values span: with one or less, an axis that marks powers alone may have no mark."""
    values = [value for series in panel.series for value in getattr(series, axis) if value > 0]
    return math.log10(max(values) / min(values)) if values else 0


def _dots(panel: Dots) -> list[go.Scatter]:
    return [_scatter(series, "markers", "error_x", list(series.x)) for series in panel.series]


def _dot_axes(figure: go.Figure, panel: Dots) -> None:
    count = len(panel.categories)
    figure.update_yaxes(tickvals=list(range(count)), ticktext=_plain(panel.categories), range=[count - 0.5, -0.5])
    figure.update_xaxes(nticks=5, tickangle=0)
    if panel.x_range:
        low, high = panel.x_range
        room = 0.03 * (high - low)
        figure.update_xaxes(range=[low - room, high + room], zeroline=low < 0 < high)


def _heat(panel: Heat) -> list[go.Heatmap]:
    text = [["" if value is None else f"{value:.0f}" for value in row] for row in panel.values]
    return [
        go.Heatmap(
            z=panel.values,
            x=_plain(panel.columns),
            y=_plain(panel.rows),
            text=text,
            texttemplate="%{text}",
            customdata=[_plain(row) for row in panel.hover],
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            zmin=0,
            zmax=100,
            colorscale="Viridis",
            showscale=False,
            xgap=2,
            ygap=2,
        )
    ]


def _heat_axes(figure: go.Figure, panel: Heat) -> None:
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)


_TRACES: dict[type, Any] = {Lines: _lines, Dots: _dots, Heat: _heat}
_AXES: dict[type, Any] = {Lines: _line_axes, Dots: _dot_axes, Heat: _heat_axes}
