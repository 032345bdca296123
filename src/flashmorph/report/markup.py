"""Pieces of the page."""

from collections.abc import Sequence
from html import escape

from flashmorph.plan import FULL, Group, Plan
from flashmorph.units import byte_size

_ON_ONE_LINE = "\u00a0"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], strong: int | None = None) -> str:
    """A table of plain texts, its first column on the left; row `strong` stands out."""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(text)}</td>" for text in row)
        kind = ' class="strong"' if number == strong else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>" if text else ""


def sentence(words: str) -> str:
    """With a capital and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def listing(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def tile(name: str, value: str, about: str) -> str:
    """One headline figure, and the figure that it is compared with."""
    return (
        f'<div class="tile"><span class="name">{escape(name)}</span><strong>{escape(value)}</strong>'
        f'<span class="about">{escape(about)}</span></div>'
    )


def strip(plan: Plan, tips: dict[str, str]) -> str:
    """A plan as a row of layers, or as a row for each key-value head; `tips` are the tooltips of groups."""
    if plan.has_heads:
        heads = sorted({group.kv_head or 0 for group in plan.assignments})
        rows = [
            [(group, option) for group, option in plan.assignments.items() if (group.kv_head or 0) == head]
            for head in heads
        ]
        return "".join(_row(plan, row, tips) for row in rows)
    return _row(plan, list(plan.assignments.items()), tips)


def _row(plan: Plan, row: Sequence[tuple[Group, str]], tips: dict[str, str]) -> str:
    cells = []
    for group, option in row:
        tip = f"{group}: {option}{tips.get(group, '')}"
        kind = "full" if option == FULL else "other"
        cells.append(f'<span class="{kind}" title="{escape(tip)}"><i>{group.layer}</i></span>')
    size = " many" if len(cells) > 20 else ""
    return f'<div class="strip{size}" role="img" aria-label="{escape(plan.strip())}">{"".join(cells)}</div>'


def percent(share: float) -> str:
    """A share as percent."""
    return f"{100 * share:.1f} %"


def span(interval: Sequence[float] | None, form: str = "{:.2f}", times: float = 1) -> str:
    """An interval, or nothing."""
    return f"{form.format(times * interval[0])} to {form.format(times * interval[1])}" if interval else ""


def size(num_bytes: float) -> str:
    """Bytes in their unit, on one line."""
    return byte_size(num_bytes).replace(" ", _ON_ONE_LINE)


def duration(seconds: float) -> str:
    """Seconds in words, on one line."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        text = f"{hours:.0f} h {minutes:.0f} min"
    else:
        text = f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
    return text.replace(" ", _ON_ONE_LINE)
