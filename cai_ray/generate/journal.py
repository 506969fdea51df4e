"""What survives a kill: the finished rows of a stage that is not done.

RUN/stage/journal/NAME/ holds `todo-*.parquet`, the rows to walk, and `done-*.parquet`, finished rows in files of a
small block. The actors write these themselves, so that what an actor has finished is safe whoever dies next, and read
them when they start, so that what is safe is not done again. At the end the rows become RUN/stage/NAME-*.parquet,
each id once, and the journal goes when the stage's manifest is written.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.cluster.usage import Usage
from cai_ray.generate import reuse
from cai_ray.storage import files
from cai_ray.storage.filesystems import read_parquet, resolve
from cai_ray.storage.records import SCHEMAS, to_table
from cai_ray.storage.run import Run
from cai_ray.storage.tables import list_rows, read_rows, write_table

FOLDER = "journal"
TODO_ROWS = 4096
SLICE_ROWS = 64
PART_ROWS = 8192
READERS = 16


class Slice(NamedTuple):
    """A few rows to walk: a row group of a file."""

    name: str
    path: str
    group: int
    rows: int

    def read(self) -> list[dict[str, Any]]:
        fs, path = resolve(self.path)
        return read_parquet(fs, path, group=self.group).to_pylist()


class Published(NamedTuple):
    """What was written in the end."""

    rows: int
    errors: int
    usage: dict[str, int]
    """Tokens by kind, and `calls` of engines."""


class Journal:
    """Of one stage and one set of rows (`name`). Plain data: it travels to the actors."""

    def __init__(self, run: Run, stage: str, schema: str, name: str):
        self.target, self.schema, self.name = run.path(stage), schema, name
        self.folder = files.join(self.target, FOLDER, name)

    def plan(self, rows: Iterable[dict[str, Any]], slice_rows: int = SLICE_ROWS) -> list[Slice]:
        """Writes the rows to walk and says where they are; never more than a file of them is in memory."""
        slices: list[Slice] = []
        rows = iter(rows)
        for number in itertools.count():
            some = list(itertools.islice(rows, TODO_ROWS))
            if not some:
                return slices
            path = files.join(self.folder, f"todo-{number:05d}.parquet")
            write_table(path, _as_table(some), slice_rows)
            for group, start in enumerate(range(0, len(some), slice_rows)):
                slices.append(Slice(self.name, path, group, min(slice_rows, len(some) - start)))
        raise AssertionError

    def finished(self) -> frozenset[str]:
        """Ids of the rows that need not be walked again. One that failed may: what failed it may have passed."""
        table = self._read(["id", "error"])
        return frozenset(table.filter(pc.is_null(table["error"]))["id"].to_pylist())

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Keeps finished rows, all or none of them."""
        path = files.join(self.folder, f"done-{time.time_ns()}-{uuid.uuid4().hex[:8]}.parquet")
        write_table(path, to_table(rows, self.schema))

    def publish(self) -> Published:
        """Writes NAME-*.parquet, each id once, in files of up to PART_ROWS rows. What an attempt wrote that was killed
        here is written over: a journal only grows.

        A row that was walked twice (it failed before, or the actor died between writing it and saying so) counts once;
        the first that did not fail is taken.
        """
        kept = _first_of_each(self._read(["id", "error"]))
        rows, start, parts = to_table([], self.schema), 0, itertools.count()
        errors, usage = 0, dict.fromkeys(Usage._fields, 0)

        def write(table: pa.Table) -> None:
            nonlocal errors
            path = files.join(self.target, f"{self.name}-{next(parts):05d}.parquet")
            write_table(path, table.combine_chunks())
            errors += table.num_rows - table["error"].null_count
            for name in usage:
                usage[name] += pc.sum(pc.struct_field(table["usage"], name)).as_py() or 0

        for table in self._done():
            rows = pa.concat_tables([rows, table.filter(kept[start : start + table.num_rows])])
            start += table.num_rows
            while rows.num_rows > PART_ROWS:
                write(rows.slice(0, PART_ROWS))
                rows = rows.slice(PART_ROWS)
        write(rows)
        return Published(int(kept.sum()), errors, usage)

    def _read(self, columns: list[str]) -> pa.Table:
        return pa.concat_tables([to_table([], self.schema).select(columns), *self._done(columns)])

    def _done(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """What is finished, file by file. They are small and many: several are read at a time."""
        fs, _ = resolve(self.folder)

        paths = list_rows(self.folder, "done")
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(paths), 4 * READERS):
                yield from pool.map(
                    lambda path: read_rows(fs, path, columns), paths[start : start + 4 * READERS]
                )


class Keeper:
    """Gathers rows that finish one by one and writes them in blocks; on the event loop of one actor.

    A block is written when it has `block` rows, when nothing else is being worked on, or after `patience` seconds,
    but not more often than every `pause` seconds. So a kill costs little more than the rows in flight, and a fast
    chain does not drown the file system in small files.
    """

    def __init__(self, journal: Journal, block: int, patience: float = 5.0, pause: float = 0.1):
        self.journal, self.block, self.patience, self.pause = journal, block, patience, pause
        self.working = 0
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around the work on a row: while there is any, blocks may wait to fill."""
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

    async def keep(self, row: dict[str, Any]) -> None:
        """Returns when the row is safe."""
        safe = asyncio.get_running_loop().create_future()
        self._waiting.append((row, safe))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())
        await safe

    async def _write(self) -> None:
        since = time.monotonic()
        while self._waiting:
            await asyncio.sleep(self.pause)
            patient = time.monotonic() - since < self.patience
            if len(self._waiting) < self.block and self.working and patient:
                continue
            taken, self._waiting = self._waiting, []
            since = time.monotonic()
            try:
                await asyncio.to_thread(self.journal.write, [row for row, _ in taken])
            except Exception as e:  # the rows' own tasks raise it
                for _, safe in taken:
                    safe.set_exception(e)
            else:
                for _, safe in taken:
                    safe.set_result(None)


def begin(run: Run, stage: str, inputs: dict[str, str]) -> None:
    """Clears the stage's folder of what a killed attempt left, unless that had the same inputs (reuse.py)."""
    note = run.path(stage, FOLDER, "inputs.json")
    try:
        same = files.read_json(note) == inputs
    except (OSError, ValueError):  # there is none, or it is damaged
        same = False
    if not same:
        reuse.set_aside(run, stage)
        files.write_json(note, inputs)


def _first_of_each(rows: pa.Table) -> np.ndarray:
    """A mask over rows (`id`, `error`): each id's first row without an error, or its first."""
    codes = pc.dictionary_encode(rows["id"].combine_chunks()).indices.to_numpy()
    count = len(codes)
    places = np.arange(count, dtype=np.int32 if count < 1 << 30 else np.int64)
    rank = places + pc.is_valid(rows["error"]).to_numpy() * places.dtype.type(count)  # failed ones come last
    first = np.full_like(places, 2 * count)
    np.minimum.at(first, codes, rank)
    return first[codes] == rank


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = {k for row in rows for k in row}
    known = {f.name: f for s in SCHEMAS.values() for f in s}
    fields = pa.schema([known[n] if n in known else pa.field(n, pa.string()) for n in sorted(names)])
    return pa.Table.from_pylist(rows, schema=fields)
