"""The page: one HTML file that needs nothing else, neither files nor network."""

import json
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from flashmorph.report.charts import Chart, Series
from flashmorph.report.interactive import spec
from flashmorph.surface.outputs import signature


@dataclass(frozen=True)
class Section:
    """A headline and what stands under it: markup, or charts."""

    title: str
    blocks: list[str | Chart] = field(default_factory=list)


def page(title: str, head: str, sections: list[Section]) -> str:
    """The HTML of a page; `head` is markup above the first section. Sections with nothing in them are left out."""
    figures: list[dict] = []
    body = []
    for section in sections:
        blocks = [_figure(block, figures) if isinstance(block, Chart) else block for block in section.blocks if block]
        if blocks:
            body.append(f"<section><h2>{escape(section.title)}</h2>{''.join(blocks)}</section>")
    # Nothing in a script's text may look like a tag: `</script` and `<!--` change where it ends.
    data = json.dumps(figures).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{escape(signature())}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}</style>
</head>
<body>
<main>
{head}
{"".join(body)}
</main>
<script type="application/json" id="figures">{data}</script>
<script>{get_plotlyjs()}</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def _figure(chart: Chart, figures: list[dict]) -> str:
    panels = []
    for panel in chart.panels:
        figures.append(spec(panel))
        title = f"<h4>{escape(panel.title)}</h4>" if panel.title else ""
        panels.append(f'<div class="panel">{title}<div class="plot"></div></div>')
    entries = "".join(_entry(series) for series in chart.legend)
    legend = f'<ul class="legend">{entries}</ul>' if len(chart.legend) > 1 else ""
    return (
        f'<figure id="{escape(chart.name)}"><h3>{escape(chart.title)}</h3>'
        f"<figcaption>{escape(chart.note)}</figcaption>"
        f'{legend}<div class="panels">{"".join(panels)}</div></figure>'
    )


def _entry(series: Series) -> str:
    look = series.look
    kind = (look.mark or "stroke") + (" dashed" if look.dashed else "")
    inside = look.colour if look.filled else "transparent"
    style = f"border-color:{look.colour};background:{inside}"
    return f'<li><b class="{kind}" style="{style}"></b>{escape(series.name)}</li>'


def _asset(name: str) -> str:
    return (files("flashmorph.report") / name).read_text(encoding="utf-8")
