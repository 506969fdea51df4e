"""Rows in Parquet files: several files of one folder are one table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cai_ray.errors import InputError
from cai_ray.storage.files import list_files, open_new, write_bytes
from cai_ray.storage.filesystems import (
    damage,
    iter_parquet,
    read_parquet,
    resolve,
)

_BATCH_ROWS = 1024
"""Rows that are read at a time: of long texts with many votes they are some ten megabytes."""
_FORMAT = {"compression": "zstd", "write_page_checksum": True}
"""Without checksums, most flipped bits would be read as other data."""


def write_table(uri: str | Path, table: pa.Table, row_group_rows: int | None = None) -> int:
    """Writes a Parquet file, whole or not at all; returns its size in bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_rows, **_FORMAT)
    data = sink.getvalue()
    write_bytes(uri, data)
    return int(data.size)


def write_tables(uri: str | Path, tables: Iterable[pa.Table], schema: pa.Schema) -> list[int]:
    """Writes a Parquet file table by table, each a row group, whole or not at all. It may be larger than memory.

    Returns:
        The rows of each row group.
    """
    rows = []
    with open_new(uri) as f, pq.ParquetWriter(f, schema, **_FORMAT) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            rows.append(table.num_rows)
    return rows


def read_tables(uri: str | Path, columns: list[str] | None = None, name: str = "part") -> pa.Table:
    """All `name`-*.parquet of a folder as one table, in the order of their ids. For large ones, see `iter_tables`."""
    fs, _ = resolve(uri)
    tables = [read_rows(fs, file, columns) for file in list_rows(uri, name)]
    if not tables:
        raise InputError(f"{uri}: holds no rows ({name}-*.parquet)")
    table = pa.concat_tables(tables)
    return in_order(table) if "id" in table.column_names else table


def in_order(table: pa.Table) -> pa.Table:
    """A table sorted by `id`. A column may be larger than two gigabytes, which Arrow's own sorting refuses."""
    ids = table["id"].cast(pa.large_string()).combine_chunks()
    if pc.all(pc.less_equal(ids[:-1], ids[1:])).as_py() in (True, None):  # None: of one row, or none
        return table
    return take(table, pc.sort_indices(ids))


def take(table: pa.Table, places: pa.Array) -> pa.Table:
    """Rows of a table by their places; a column may have any size."""
    if table.nbytes < 1 << 30:
        return table.combine_chunks().take(places)
    # Offsets have 64 bits on the way.
    large = table.cast(pa.schema([(f.name, _large(f.type)) for f in table.schema])).combine_chunks()
    rows = max(1, (1 << 28) * table.num_rows // table.nbytes)
    taken = (large.take(places[i : i + rows]) for i in range(0, len(places), rows))
    return pa.concat_tables([table.slice(0, 0), *(part.cast(table.schema) for part in taken)])


def _large(kind: pa.DataType) -> pa.DataType:
    """A type with offsets of 64 bits in the place of 32."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(_large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(f.name, _large(f.type)) for f in kind])
    return kind


def iter_tables(
    uri: str | Path, columns: list[str] | None = None, name: str = "part", rows: int = _BATCH_ROWS
) -> Iterator[pa.Table]:
    """All `name`-*.parquet of a folder, some rows at a time: they may be larger than memory.

    They come in the order of the files; a stage that generates writes its rows in the order of their ids.
    """
    fs, _ = resolve(uri)
    for file in list_rows(uri, name):
        yield from iter_file(fs, file, columns, rows)


def read_rows(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    """Reads a file of rows that a run wrote.

    Raises:
        InputError: the file is damaged.
    """
    with _damage_named(path):
        return read_parquet(fs, path, columns)


def iter_file(
    fs: pafs.FileSystem, path: str, columns: list[str] | None = None, rows: int = _BATCH_ROWS
) -> Iterator[pa.Table]:
    """Reads a file of rows that a run wrote, some rows at a time.

    Raises:
        InputError: the file is damaged.
    """
    with _damage_named(path):
        yield from iter_parquet(fs, path, rows, columns)


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Turns damage of a file into an error that says how to mend it: delete it, and the stage writes it again."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as e:
        if (fault := damage(e)) is None:
            raise
        raise InputError(
            f"{path}: is damaged ({fault}); delete it, and its stage's manifest.json if there is one, and run the "
            "stage again"
        ) from e


def list_rows(uri: str | Path, name: str = "part") -> list[str]:
    """Paths of `name`-*.parquet of a folder, sorted, without the scheme."""
    return [f for f in list_files(uri, ".parquet") if os.path.basename(f).startswith(f"{name}-")]


def has_rows(uri: str | Path, name: str = "part") -> bool:
    """Whether a folder holds `name`-*.parquet."""
    return bool(list_rows(uri, name))


def delete_rows(uri: str | Path, name: str = "part") -> None:
    """Deletes `name`-*.parquet from a folder."""
    fs, _ = resolve(uri)
    for path in list_rows(uri, name):
        fs.delete_file(path)
