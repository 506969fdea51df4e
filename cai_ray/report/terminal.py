"""Tables on stdout: drawn by Rich on a terminal, aligned plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cai_ray.cluster.progress import is_terminal
from cai_ray.report.text import columns


def print_table(rows: Sequence[Sequence[str]], *, head: bool = False, plain: str | None = None) -> None:
    """Prints rows of cells as a table.

    Args:
        head: the first row holds the titles of the columns.
        plain: what is printed where stdout is no terminal; by default the cells in columns.
    """
    if not is_terminal(sys.stdout):
        print("\n".join(columns([list(row) for row in rows])) if plain is None else plain)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if head else None, show_header=head, pad_edge=False)
    for i, title in enumerate(rows[0]):
        table.add_column(title if head else "", no_wrap=i == 0)
    for row in rows[1:] if head else rows:
        table.add_row(*row)
    Console(markup=False, emoji=False, highlight=False).print(table)
