"""Pictures of a comparison."""

from pathlib import Path

import matplotlib

from flashmorph.records import Figures
from flashmorph.selection import DEFAULT_STRATEGY
from flashmorph.surface.outputs import save_picture

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

_FLOOR = 1e-4


def draw_regret(summary: Figures, path: Path) -> None:
    """Regret against search FLOPs, one panel a budget, one line a strategy over its spends, the default's black; a PNG.

    Strategies without a search are horizontal lines at the left edge.
    """
    budgets = list(summary["truths"])
    figure, panels = plt.subplots(1, len(budgets), figsize=(5 * len(budgets), 4.5), squeeze=False, sharey=True)
    strategies = sorted({row["strategy"] for row in summary["rows"]})
    colours = {name: plt.get_cmap("tab20")(index % 20) for index, name in enumerate(strategies)}
    colours[DEFAULT_STRATEGY] = (0.0, 0.0, 0.0, 1.0)
    for panel, budget in zip(panels[0], budgets, strict=True):
        for name in strategies:
            rows = [row for row in summary["rows"] if (row["strategy"], row["budget"]) == (name, budget)]
            rows = sorted((row for row in rows if row["regret"] is not None), key=lambda row: row["flops"])
            if not rows:
                continue
            regrets = [row["regret"] + _FLOOR for row in rows]
            if rows[-1]["flops"] == 0:
                panel.axhline(regrets[-1], color=colours[name], linestyle=":", linewidth=1, label=name)
            else:
                panel.plot([row["flops"] for row in rows], regrets, "o-", color=colours[name], markersize=4, label=name)
        panel.set(xscale="log", yscale="log", xlabel="search FLOPs", title=f"budget {budget}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"regret + {_FLOOR:g}, nats an answer token")
    figure.tight_layout()
    lines, names = panels[0][-1].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    save_picture(figure, path, dpi=150, bbox_inches="tight")
    plt.close(figure)
