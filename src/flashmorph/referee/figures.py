"""Pictures of a comparison."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from flashmorph.records import Figures
from flashmorph.selection import DEFAULT_STRATEGY
from flashmorph.surface.outputs import save_picture

_FLOOR = 1e-4


def draw_regret(summary: Figures, path: Path) -> None:
    """Regret against search FLOPs, one panel a budget, one line a strategy over its spends, the default's black; a PNG.

    Strategies without a search are horizontal lines at the left edge. Above a best known plan the regret may be
    negative, so that panel has a linear axis with a line at 0.
    """
    budgets = list(summary["truths"])
    figure = Figure(figsize=(5 * len(budgets), 4.5))
    panels = figure.subplots(1, len(budgets), squeeze=False, sharey=True)
    strategies = sorted({row["strategy"] for row in summary["rows"]})
    colours = {name: matplotlib.colormaps["tab20"](index % 20) for index, name in enumerate(strategies)}
    colours[DEFAULT_STRATEGY] = (0.0, 0.0, 0.0, 1.0)
    found = any(truth["reference"] == "found" for truth in summary["truths"].values())
    floor = 0.0 if found else _FLOOR
    for panel, budget in zip(panels[0], budgets, strict=True):
        for name in strategies:
            rows = [row for row in summary["rows"] if (row["strategy"], row["budget"]) == (name, budget)]
            rows = sorted((row for row in rows if row["regret"] is not None), key=lambda row: row["flops"])
            if not rows:
                continue
            regrets = [row["regret"] + floor for row in rows]
            if rows[-1]["flops"] == 0:
                panel.axhline(regrets[-1], color=colours[name], linestyle=":", linewidth=1, label=name)
            else:
                flops, shade = [row["flops"] for row in rows], colours[name]
                widths = [row["half_width"] or 0.0 for row in rows] if found else None
                panel.errorbar(flops, regrets, widths, fmt="o-", color=shade, markersize=4, capsize=2, label=name)
        panel.set(xscale="log", xlabel="search FLOPs", title=f"budget {budget}")
        if found:
            panel.axhline(0.0, color="gray", linewidth=1)
        else:
            panel.set_yscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    measured = "loss minus the best known plan's" if found else f"regret + {_FLOOR:g}"
    panels[0][0].set_ylabel(f"{measured}, nats an answer token")
    figure.tight_layout()
    lines, names = panels[0][-1].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    save_picture(figure, path, dpi=150, bbox_inches="tight")
