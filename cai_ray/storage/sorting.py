"""Rows sorted by id in bounded memory.

Ids are dealt to ranges, which wait on this node's disk; then each range is sorted by itself and written. So only a few
tens of megabytes are in memory, however many rows there are and however long their texts.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from cai_ray.storage.files import join
from cai_ray.storage.filesystems import is_local, resolve
from cai_ray.storage.tables import delete_rows, in_order, take, write_table

PART_BYTES = 32 << 20
"""Size in memory of the rows of a file, and of the rows that wait to be dealt."""
RANGES = 512
"""Ranges at most. Each is read whole: a five-hundredth of all rows."""
_RANGE_ROWS = 256
_SAMPLE = 1 << 16


class SortedWriter:
    """Writes rows as `name`-*.parquet of a folder: in the order of their ids, over all files. A context manager.

    Files of the same name are replaced by `write`, and not before it.

    Args:
        ids: the rows' ids, or most of them: ranges of equal size are made of them. Any order will do.
    """

    def __init__(self, uri: str, schema: pa.Schema, ids: Iterable[str], name: str = "part"):
        self.uri, self.name, self.schema = uri, name, schema
        self.bounds = _bounds(ids)
        fs, path = resolve(uri)
        if is_local(fs):  # where the rows themselves have room
            self.folder = Path(path) / f".sorting-{name}"
            shutil.rmtree(self.folder, ignore_errors=True)  # left by a process that was killed
            self.folder.mkdir(parents=True)
        else:
            self.folder = Path(tempfile.mkdtemp(prefix="cai-ray-sorting-"))
        self._waiting: list[pa.Table] = []
        self._bytes = 0

    def __enter__(self) -> SortedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._bytes += table.nbytes
        if self._bytes > PART_BYTES:
            self._deal()

    def write(self, keep: Callable[[pa.Table], pa.Table] = lambda table: table) -> Iterator[pa.Table]:
        """Writes the files, and yields the rows of each when it is there. There is a file even if there are no rows.

        Args:
            keep: called with the rows of some ranges in the order of their ids, rows with the same id in the order in
                which they were added; gives those that are written.
        """
        self._deal()
        delete_rows(self.uri, self.name)  # of an attempt that was killed while it wrote; it may have had more
        number, part = 0, self.schema.empty_table()
        for index in range(len(self.bounds) + 1):
            if rows := self._read(index):
                part = pa.concat_tables([part, *rows])
            if part.nbytes > PART_BYTES or index == len(self.bounds):
                part = keep(in_order(part))
                if part.num_rows or not number:
                    write_table(join(self.uri, f"{self.name}-{number:05d}.parquet"), part)
                    yield part
                    number += 1
                part = self.schema.empty_table()

    def _deal(self) -> None:
        """Appends the waiting rows to the files of their ranges."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting, self._bytes = [], 0
        ids = np.array([id.encode() for id in table["id"].to_pylist()])
        ranges = np.searchsorted(self.bounds, ids, side="right")
        dealt, start = take(table, pa.array(np.argsort(ranges, kind="stable"))), 0
        for index, count in zip(*np.unique(ranges, return_counts=True), strict=True):
            self._append(int(index), dealt.slice(start, int(count)))
            start += int(count)

    def _append(self, index: int, table: pa.Table) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(self._path(index), "ab") as f,
            pa.ipc.new_stream(f, self.schema, options=options) as out,
        ):
            out.write_table(table)

    def _read(self, index: int) -> list[pa.Table]:
        """The rows of a range: its file is one stream after another."""
        path, tables = self._path(index), []
        if os.path.exists(path):
            with pa.OSFile(path, "rb") as f:
                size = f.size()
                while f.tell() < size:
                    with pa.ipc.open_stream(f) as stream:
                        tables.append(stream.read_all())
            os.unlink(path)
        return tables

    def _path(self, index: int) -> str:
        return str(self.folder / f"{index:05d}.arrow")


def _bounds(ids: Iterable[str]) -> np.ndarray:
    """The first ids of all ranges but the first."""
    sample, count, rng = list[bytes](), 0, random.Random(0)
    for count, id in enumerate(ids, 1):  # a reservoir (Vitter 1985)
        if len(sample) < _SAMPLE:
            sample.append(id.encode())
        elif (place := rng.randrange(count)) < _SAMPLE:
            sample[place] = id.encode()
    ranges = min(RANGES, count // _RANGE_ROWS)
    if ranges < 2:
        return np.array([], dtype="S1")
    ordered = np.sort(np.array(sample))
    return np.unique(ordered[np.linspace(0, len(ordered), ranges, endpoint=False).astype(int)[1:]])
