"""Rows in Parquet files: several files of one folder are one table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cai_ray.errors import InputError
from cai_ray.storage.files import list_files, write_bytes
from cai_ray.storage.filesystems import (
    damage,
    iter_parquet,
    read_parquet,
    resolve,
)


def write_table(uri: str | Path, table: pa.Table, row_group_rows: int | None = None) -> None:
    """Writes a Parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    # Without checksums, most flipped bits would be read as other data.
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows, write_page_checksum=True)
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_tables(uri: str | Path, columns: list[str] | None = None, name: str = "part") -> pa.Table:
    """All `name`-*.parquet of a folder as one table, in the order of their ids."""
    fs, _ = resolve(uri)
    tables = [read_rows(fs, file, columns) for file in list_rows(uri, name)]
    if not tables:
        raise InputError(f"{uri}: holds no rows ({name}-*.parquet)")
    table = pa.concat_tables(tables)
    return table.sort_by("id") if "id" in table.column_names else table


def iter_tables(
    uri: str | Path, columns: list[str] | None = None, name: str = "part", rows: int = 4096
) -> Iterator[pa.Table]:
    """All `name`-*.parquet of a folder, some rows at a time: they may be larger than memory."""
    fs, _ = resolve(uri)
    for file in list_rows(uri, name):
        with _damage_named(file):
            yield from iter_parquet(fs, file, rows, columns)


def read_rows(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    """Reads a file of rows that a run wrote.

    Raises:
        InputError: the file is damaged.
    """
    with _damage_named(path):
        return read_parquet(fs, path, columns)


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
