"""Rows of Arrow tables as Python values.

Some values cannot become Python values, such as a date in the year 33,658 or a time zone that this machine does not
know. They are read as texts, and where that fails too the cell counts as empty: a column that nobody reads must not
keep the others from being read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cai_ray.data.left_out import OddRow


def rows_of(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any] | OddRow]:
    """The rows of a table, with maps as dictionaries."""
    try:
        rows = _values(table)
    except Exception:  # a value of any type may be at fault, in its own way
        rows = (_row(table.slice(number, 1)) for number in range(table.num_rows))
    yield from rows


def _values(table: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a map that has a key twice; the last one counts, as in JSON
        return table.to_pylist(maps_as_pydicts="lossy")


def _row(table: pa.Table | pa.RecordBatch) -> dict[str, Any] | OddRow:
    row = {}
    for name, column in zip(table.schema.names, table.columns, strict=True):
        try:
            (row[name],) = _values(column)
        except UnicodeDecodeError:
            return OddRow("not UTF-8", f"column {name}")
        except Exception:
            try:
                (row[name],) = column.cast(pa.string()).to_pylist()
            except (pa.ArrowException, ValueError):
                row[name] = None
    return row
