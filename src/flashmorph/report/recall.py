"""Recall of the models."""

from flashmorph.records import Figures
from flashmorph.report.charts import Chart, Dots, Heat, Series
from flashmorph.report.looks import label, look
from flashmorph.report.markup import percent, span
from flashmorph.report.source import Source

_ROOM = 0.7
_ALL = "all"


def dodged(index: int, number: int, total: int) -> float:
    """The coordinate of the nth of `total` series in a category, dodged beside the others."""
    return index + _ROOM * ((number + 0.5) / total - 0.5)


def by_task(source: Source) -> Chart | None:
    """Recall by task with intervals."""
    models = source.models
    tasks = list(next(iter(models.values()))["recall_by_task"])
    series = []
    for number, (name, figures) in enumerate(models.items()):
        shares = [figures["recall_by_task"][task] for task in tasks]
        series.append(
            Series(
                label(name),
                [100 * each["recall"] for each in shares],
                [dodged(index, number, len(models)) for index in range(len(tasks))],
                look(name, number),
                [100 * each["interval"][0] for each in shares],
                [100 * each["interval"][1] for each in shares],
                [f"{label(name)}, {task}: {_figure(each)}" for task, each in zip(tasks, shares, strict=True)],
            )
        )
    panel = Dots("", "right answers, %", "task", tasks, series, (0, 100))
    note = "Greedy generation with the cache, exact match of the whole answer; bars are 95 % intervals."
    return Chart("recall", "Recall by task", note, [panel])


def grids(source: Source) -> list[Chart]:
    """Heatmaps of the models side by side, one chart a context length."""
    if not source.evaluated:
        return []
    by_model = {name: each["grid"] for name, each in source.evaluated["models"].items() if "grid" in each}
    rows = [row for grid in by_model.values() for row in grid["rows"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    return [_grid(by_model, tasks, length) for length in lengths]


def worst(source: Source) -> list[str]:
    """The mean of each grid, and its worst cells."""
    lines = []
    models = (source.evaluated or {"models": {}})["models"]
    first = label(next(iter(models), ""))
    for name, each in models.items():
        if "grid" not in each:
            continue
        minus = each.get("minus_first", {}).get("grid")
        against = ""
        if minus:
            interval = span(minus["interval"], "{:+.1f}", 100)
            against = f", {100 * minus['difference']:+.1f} points against {first} ({interval})"
        cells = [
            f"{cell['task']} at {cell['length']:,}"
            + ("" if cell["depth"] is None else f", depth {100 * cell['depth']:.0f} %")
            + f": {100 * cell['recall']:.0f} %"
            for cell in each["grid"]["worst"]
        ]
        ending = f". Worst cells: {'; '.join(cells)}." if cells else "."
        lines.append(f"{label(name)}: mean of the grid {percent(each['grid']['recall'])}{against}{ending}")
    return lines + [f"left out: {text}" for text in next(iter(models.values()), {}).get("grid", {}).get("left_out", [])]


def _grid(found: Figures, tasks: list[str], length: int) -> Chart:
    by_model = {
        name: {row["task"]: row for row in grid["rows"] if row["length"] == length} for name, grid in found.items()
    }
    every = [row for rows in by_model.values() for row in rows.values()]
    depths = next(([cell["depth"] for cell in row["depths"]] for row in every if row["depths"]), [])
    tasks = [task for task in tasks if any(task in rows for rows in by_model.values())]
    panels = []
    for name, rows in by_model.items():
        values, hover = [], []
        for task in tasks:
            row = rows.get(task)
            cells = {cell["depth"]: cell for cell in row["depths"]} if row else {}
            shown = [*(cells.get(depth) for depth in depths), row]
            values.append([100 * cell["recall"] if cell else None for cell in shown])
            names = [*(f"depth {100 * depth:.0f} %" for depth in depths), "all depths"]
            hover.append(
                [
                    f"{label(name)}\n{task}, {depth_name}\n{_figure(cell)}" if cell else ""
                    for depth_name, cell in zip(names, shown, strict=True)
                ]
            )
        columns = [*(f"{100 * depth:.0f}" for depth in depths), _ALL]
        panels.append(Heat(label(name), "depth of the needle, %", "task", columns, tasks, values, hover))
    note = (
        f"Right answers in % by depth of what is asked for; {_ALL}: the task as a whole. "
        f"{every[0]['questions']} questions a task, spread over the depths."
    )
    return Chart(f"grid_{length}", f"Recall at {length:,} tokens", note, panels)


def _figure(cell: Figures) -> str:
    return f"{percent(cell['recall'])} ({span(cell['interval'], '{:.1f}', 100)}), {cell['questions']} questions"
