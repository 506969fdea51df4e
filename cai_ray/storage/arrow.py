"""Rows as Arrow tables: the schema of a record is derived from its declaration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints, is_typeddict

import pyarrow as pa

Record = TypeVar("Record", bound=Mapping[str, Any])

_PLAIN = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


def arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of a column's annotation: str, int, float, bool, a list, a record, or one of them or None.

    Raises:
        TypeError: the annotation is none of these.
    """
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if is_typeddict(annotation):
        return pa.struct(_fields(annotation))
    inner = [arg for arg in get_args(annotation) if arg is not NoneType]
    if len(inner) != 1:
        raise TypeError(
            f"{annotation} has no Arrow type; use str, int, float, bool, list, a record, or `| None`"
        )
    return pa.list_(arrow_type(inner[0])) if get_origin(annotation) is list else arrow_type(inner[0])


def _fields(record: type) -> list[tuple[str, pa.DataType]]:
    return [(name, arrow_type(hint)) for name, hint in get_type_hints(record).items()]


@cache
def schema_of(record: type) -> pa.Schema:
    """The Arrow schema of a record: its columns in the order of their declaration."""
    return pa.schema(_fields(record))


def to_table(rows: Iterable[Mapping[str, Any]], record: type | pa.Schema) -> pa.Table:
    """Rows as an Arrow table of a record, or of a record's schema; a column that a row leaves out is null.

    Raises:
        TypeError: a row has a column that the record does not declare.
    """
    schema = record if isinstance(record, pa.Schema) else schema_of(record)
    rows, declared = list(rows), _declared(schema)
    for row in rows:
        if column := _undeclared(row, declared):
            raise TypeError(
                f"column {column} is not declared by the record of {', '.join(schema.names)}; declare it "
                "(cai_ray/storage/records.py), or leave it out of the row"
            )
    return pa.Table.from_pylist(rows, schema=schema)


def to_tables(
    rows: Iterable[Mapping[str, Any]], record: type | pa.Schema, size: int = 1024
) -> Iterator[pa.Table]:
    """Rows as tables of `size` rows; no more of them are in memory."""
    rows = iter(rows)
    while block := list(islice(rows, size)):
        yield to_table(block, record)


def _declared(fields: Iterable[pa.Field]) -> dict[str, Any]:
    """The names of columns; under each, those of the records in it."""
    inner = {f.name: f.type.value_type if pa.types.is_list(f.type) else f.type for f in fields}
    return {name: _declared(kind) if pa.types.is_struct(kind) else None for name, kind in inner.items()}


def _undeclared(row: Mapping[str, Any], declared: Mapping[str, Any]) -> str | None:
    """The first column of a row, or of a record in it, that is not declared."""
    if names := row.keys() - declared.keys():
        return min(names)
    for name, inner in declared.items():
        value = row.get(name) if inner else None
        for part in (value,) if isinstance(value, Mapping) else value or ():
            if column := _undeclared(part, inner):
                return f"{name}.{column}"
    return None


def select(row: Mapping[str, Any], record: type[Record]) -> Record:
    """Those columns of a row that another record declares, too."""
    return cast(Record, {name: row[name] for name in schema_of(record).names if name in row})
