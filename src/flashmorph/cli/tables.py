"""The form of every printed table."""

from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.table import Table


def new_table(title: str | None, *columns: str, left: Collection[str] | None = None) -> Table:
    """A table without lines between rows: the columns `left` (the first one) on the left, all others on the right.

    On a narrow terminal what is on the left wraps, figures do not.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        is_left = number == 0 if left is None else name in left
        table.add_column(name, justify="left" if is_left else "right", no_wrap=not is_left)
    return table
