"""The tables of `flashmorph evaluate`, at most 100 columns wide."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from flashmorph.cli.tables import new_table
from flashmorph.files import short_names
from flashmorph.records import Figures
from flashmorph.surface.terminal import bold
from flashmorph.units import byte_size, longest_context


def show_figures(console: Console, figures: Figures) -> None:
    """Print what `pipeline.evaluate_models` found."""
    from flashmorph.evaluation import shortage

    labels = short_names(list(figures))
    console.print(overview(figures, labels))
    for note in dict.fromkeys(filter(None, map(shortage, figures.values()))):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(by_task(figures, labels))
    console.print(by_position(figures, labels))
    if any("grid" in each for each in figures.values()):
        for table in grids(figures, labels):
            console.print(table)
        for line in notes(figures, labels):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name, each in figures.items():
        if "tokens" in each.get("minus_first", {}):
            console.print(tokens(each["minus_first"]["tokens"]["classes"], labels[name], labels[next(iter(figures))]))
    if any("harness" in each for each in figures.values()):
        console.print(harness(figures, labels))


def overview(figures: Figures, labels: dict[str, str]) -> Table:
    """A line a model."""
    context = longest_context(each["cache_bytes"] for each in figures.values())
    column = f"cache at {int(context):,}"
    table = new_table("95 % intervals in brackets", "model", "recall", "", "perplexity", "", column)
    for name, each in figures.items():
        cache = byte_size(each["cache_bytes"][context])
        text = span(each.get("perplexity_interval"), "{:.2f}")
        recall = f"{100 * each['recall']:.1f} %"
        table.add_row(
            labels[name], recall, percent_span(each["recall_interval"]), f"{each['perplexity']:.3f}", text, cache
        )
    return table


def by_task(figures: Figures, labels: dict[str, str]) -> Table:
    """Recall of the recipe's tasks."""
    first, *_ = figures
    rows: dict[str, Callable[[Figures], tuple]] = {}
    for task in figures[first]["recall_by_task"]:

        def row(each: Figures, task: str = task) -> tuple:
            minus = each.get("minus_first", {}).get("recall", {}).get("by_task", {}).get(task)
            value = each["recall_by_task"][task]
            return f"{100 * value['recall']:.1f}", percent_span(value["interval"]), percent_difference(minus)

        rows[task] = row
    return _grouped("recall by task, %", ("recall", "", f"minus {labels[first]}"), figures, labels, rows)


def by_position(figures: Figures, labels: dict[str, str]) -> Table:
    """Perplexity by position in the context."""
    first, *_ = figures
    rows: dict[str, Callable[[Figures], tuple]] = {}
    for part in figures[first]["perplexity_by_position"]:

        def row(each: Figures, start: int = part["from"]) -> tuple:
            parts, ratio = each["perplexity_by_position"], each.get("minus_first", {}).get("perplexity")
            index = next((index for index, one in enumerate(parts) if one["from"] == start), None)
            if index is None:  # Another tokenizer makes other lengths of the same documents.
                return "", "", ""
            shown = _ratio(ratio["by_position"][index]) if ratio else ""
            return f"{parts[index]['perplexity']:.2f}", span(parts[index]["interval"], "{:.2f}"), shown

        rows[f"{part['from']:,}-{part['to']:,}"] = row

    def whole(each: Figures) -> tuple:
        ratio = each.get("minus_first", {}).get("perplexity")
        shown = _ratio(ratio) if ratio else ""
        return f"{each['perplexity']:.2f}", span(each.get("perplexity_interval"), "{:.2f}"), shown

    rows["all"] = whole
    columns = ("perplexity", "", f"of {labels[first]}'s")
    return _grouped("perplexity by position in the context", columns, figures, labels, rows)


def grids(figures: Figures, labels: dict[str, str]) -> list[Table]:
    """One table a context length, needle depths as columns."""
    first, *_ = figures
    lengths = dict.fromkeys(row["length"] for each in figures.values() for row in each["grid"]["rows"])
    return [_grid(figures, labels, first, length) for length in lengths]


def _grid(figures: Figures, labels: dict[str, str], first: str, length: int) -> Table:
    found = {
        name: {row["task"]: row for row in each["grid"]["rows"] if row["length"] == length}
        for name, each in figures.items()
    }
    depths = next((row["depths"] for rows in found.values() for row in rows.values() if row["depths"]), [])
    columns = [*(f"{100 * cell['depth']:.0f}" for cell in depths), "all", "", f"minus {labels[first]}"]
    table = new_table(f"recall at {length:,} tokens by depth of the needle, %", "depth, %", *columns)
    for task in dict.fromkeys(task for rows in found.values() for task in rows):
        table.add_row(bold(task))
        for name, rows in found.items():
            if task not in rows:
                continue
            row = rows[task]
            cells = [f"{100 * cell['recall']:.0f}" for cell in row["depths"]] or [""] * len(depths)
            differences = figures[name].get("minus_first", {}).get("grid", {}).get("rows", [])
            minus = next((each for each in differences if (each["task"], each["length"]) == (task, length)), None)
            whole = f"{100 * row['recall']:.0f}"
            span_all = percent_span(row["interval"], "{:.0f}")
            table.add_row(f"  {labels[name]}", *cells, whole, span_all, percent_difference(minus, "{:+.0f}"))
    return table


def notes(figures: Figures, labels: dict[str, str]) -> list[str]:
    """Means over the grid, the worst cells, and the tasks that were left out."""
    first, *_ = figures
    lines = []
    for name, each in figures.items():
        grid, minus = each["grid"], each.get("minus_first", {}).get("grid")
        line = f"{labels[name]}: mean of the grid {100 * grid['recall']:.1f} %"
        lines.append(line + (f", {percent_difference(minus)} against {labels[first]}" if minus else ""))
        for cell in grid["worst"]:
            where = "" if cell["depth"] is None else f", depth {100 * cell['depth']:.0f} %"
            below = f", {100 * (cell['first'] - cell['recall']):.0f} below {labels[first]}" if "first" in cell else ""
            figure = f"{100 * cell['recall']:.0f} % {percent_span(cell['interval'], '{:.0f}')}"
            lines.append(f"  among its worst: {cell['task']} at {cell['length']:,}{where}: {figure}{below}")
    return lines + [f"left out: {text}" for text in figures[first]["grid"]["left_out"]]


def tokens(classes: list[Figures], label: str, first: str) -> Table:
    """Loss of one model minus the first's by class of token."""
    title = f"loss in nats by class of token, {label} minus {first}"
    table = new_table(title, "", "share", f"{first}'s", "minus", "")
    total, group = classes[0]["tokens"], None
    for each in classes:
        if each["group"] != group and each["group"] != "all":
            table.add_row(bold(each["group"]))
        group = each["group"]
        low, high = (f"{end:+.3f}" for end in each["interval"]) if each["interval"] else ("", "")
        share = f"{100 * each['tokens'] / total:.1f} %"
        figures = (share, f"{each['first']:.3f}", f"{each['difference']:+.3f}", f"({low} to {high})" if low else "")
        table.add_row(f"  {each['class']}" if group != "all" else each["class"], *figures)
    return table


def harness(figures: Figures, labels: dict[str, str]) -> Table:
    """Tasks of lm-evaluation-harness."""
    first, *_ = figures
    rows: dict[str, Callable[[Figures], tuple]] = {}
    for index, figure in enumerate(figures[first]["harness"]):
        key = (figure["task"], figure["metric"])

        def row(each: Figures, index: int = index, key: tuple[str, str] = key) -> tuple:
            value, minus = each["harness"][index], each.get("minus_first", {}).get("harness", [])
            difference = next((one for one in minus if (one["task"], one["metric"]) == key), None)
            shown = ""
            if difference:
                one = f"x {difference['ratio']:.3f}" if "ratio" in difference else f"{difference['difference']:+.3f}"
                low, high = difference["interval"]
                shown = f"{one} ({low:.3f} to {high:.3f})"
            return f"{value['value']:.3f}", span(value["interval"], "{:.3f}"), shown

        rows[" ".join(key)] = row
    return _grouped("lm-evaluation-harness", ("", "", f"minus {labels[first]}"), figures, labels, rows)


def _grouped(
    title: str,
    columns: tuple[str, ...],
    figures: Figures,
    labels: dict[str, str],
    rows: dict[str, Callable[[Figures], tuple]],
) -> Table:
    """A line for each model under each row's name; with a single model, beside it."""
    if len(figures) == 1:
        table = new_table(title, "", *columns[:-1])
        for name, row in rows.items():
            table.add_row(name, *row(next(iter(figures.values())))[:-1])
        return table
    table = new_table(title, "", *columns)
    for name, row in rows.items():
        table.add_row(bold(name))
        for model, each in figures.items():
            table.add_row(f"  {labels[model]}", *row(each))
    return table


def _ratio(figure: Figures) -> str:
    return f"x {figure['ratio']:.3f} {span(figure['interval'], '{:.3f}')}"


def span(interval: Any, form: str) -> str:
    """An interval in brackets, or nothing."""
    return f"({form.format(interval[0])}-{form.format(interval[1])})" if interval else ""


def percent_span(interval: Any, form: str = "{:.1f}") -> str:
    """An interval of shares in percent."""
    return span([100 * end for end in interval], form)


def percent_difference(minus: Figures | None, form: str = "{:+.1f}") -> str:
    """A difference of shares in points with its interval, or nothing."""
    if not minus:
        return ""
    low, high = (form.format(100 * end) for end in minus["interval"])
    return f"{form.format(100 * minus['difference'])} ({low} to {high})"
