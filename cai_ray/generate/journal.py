"""The journal of a stage: its finished rows survive a kill.

RUN/stage/journal/NAME/ holds `todo-*.parquet`, the rows to process, and `done-*.parquet`, small blocks of finished
rows. The actors write the blocks themselves, so a finished row is safe whichever process dies next; they read the
blocks when they start, so a finished row is not processed again. At the end the rows become RUN/stage/NAME-*.parquet,
each id once. The journal is deleted when the stage's manifest is written.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.cluster.usage import Usage
from cai_ray.generate import reuse
from cai_ray.storage import files
from cai_ray.storage.arrow import schema_of, to_table
from cai_ray.storage.filesystems import read_parquet, resolve
from cai_ray.storage.run import Run
from cai_ray.storage.tables import list_rows, read_rows, write_table

FOLDER = "journal"
TODO_ROWS = 4096
SLICE_ROWS = 64
PART_ROWS = 8192
READERS = 16


class Slice(NamedTuple):
    """A few rows to process: one row group of a file."""

    name: str
    """The set of rows that it belongs to (`Journal.name`)."""
    path: str
    group: int
    rows: int

    def read(self) -> list[dict[str, Any]]:
        fs, path = resolve(self.path)
        return read_parquet(fs, path, group=self.group).to_pylist()


class Published(NamedTuple):
    """Counts over the published rows."""

    rows: int
    errors: int
    usage: dict[str, int]
    """Tokens by kind, and `calls` of engines."""


class Journal:
    """The journal of one set of rows (`name`) of a stage. Plain data: it travels to the actors.

    Args:
        takes: the record of the rows to process.
        gives: the record of the finished rows.
    """

    def __init__(self, run: Run, stage: str, takes: type, gives: type, name: str):
        # Schemas, not the classes: an actor could not import a class of a script.
        self.takes, self.gives = schema_of(takes), schema_of(gives)
        self.target, self.name = run.path(stage), name
        self.folder = files.join(self.target, FOLDER, name)

    def plan(self, rows: Iterable[Mapping[str, Any]], slice_rows: int = SLICE_ROWS) -> list[Slice]:
        """Writes the rows to process and returns where they are. Holds at most one file of them in memory."""
        slices: list[Slice] = []
        rows = iter(rows)
        for number in itertools.count():
            block = list(itertools.islice(rows, TODO_ROWS))
            if not block:
                return slices
            path = files.join(self.folder, f"todo-{number:05d}.parquet")
            write_table(path, to_table(block, self.takes), slice_rows)
            for group, start in enumerate(range(0, len(block), slice_rows)):
                slices.append(Slice(self.name, path, group, min(slice_rows, len(block) - start)))
        raise AssertionError

    def finished_ids(self) -> frozenset[str]:
        """Ids of the rows that are done. Failed rows are not among them: the cause may be gone at the next attempt."""
        table = self._read(["id", "error"])
        return frozenset(table.filter(pc.is_null(table["error"]))["id"].to_pylist())

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes finished rows, all or none of them."""
        path = files.join(self.folder, f"done-{time.time_ns()}-{uuid.uuid4().hex[:8]}.parquet")
        write_table(path, to_table(rows, self.gives))

    def failed(self, row: Mapping[str, Any], made: Mapping[str, Any], error: str) -> dict[str, Any]:
        """The finished form of a row that failed: the columns that it shares with finished rows, those that were made
        before it failed, and its error."""
        have = {**made, **row, "error": error}
        return {name: have[name] for name in self.gives.names if name in have}

    def publish(self, show: Callable[[pa.Table], None] = lambda table: None) -> Published:
        """Writes NAME-*.parquet, each id once, in files of up to PART_ROWS rows. `show` gets the rows of each file.

        Files of an attempt that was killed while publishing are overwritten: a journal only grows. A row that was
        processed twice (it failed before, or its actor died before it could report it) counts once: the first
        occurrence without an error is taken.
        """
        chosen = _first_of_each(self._read(["id", "error"]))
        rows, start, parts = to_table([], self.gives), 0, itertools.count()
        errors, usage = 0, dict.fromkeys(Usage._fields, 0)

        def write(table: pa.Table) -> None:
            nonlocal errors
            path = files.join(self.target, f"{self.name}-{next(parts):05d}.parquet")
            write_table(path, table.combine_chunks())
            show(table)
            errors += table.num_rows - table["error"].null_count
            for name in usage:
                usage[name] += pc.sum(pc.struct_field(table["usage"], name)).as_py() or 0

        for table in self._done():
            rows = pa.concat_tables([rows, table.filter(chosen[start : start + table.num_rows])])
            start += table.num_rows
            while rows.num_rows > PART_ROWS:
                write(rows.slice(0, PART_ROWS))
                rows = rows.slice(PART_ROWS)
        write(rows)
        return Published(int(chosen.sum()), errors, usage)

    def _read(self, columns: list[str]) -> pa.Table:
        return pa.concat_tables([to_table([], self.gives).select(columns), *self._done(columns)])

    def _done(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The finished rows, file by file. The files are small and many, so several are read at a time."""
        fs, _ = resolve(self.folder)
        paths = list_rows(self.folder, "done")
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(paths), 4 * READERS):
                yield from pool.map(
                    lambda path: read_rows(fs, path, columns), paths[start : start + 4 * READERS]
                )


class JournalWriter:
    """Collects rows that finish one by one and writes them in blocks; runs on the event loop of one actor.

    A block is written when it has `block` rows, when no other row is being processed, or after `patience` seconds,
    but never more often than every `pause` seconds. So a kill costs little more than the rows in flight, and a fast
    chain does not flood the file system with small files.
    """

    def __init__(self, journal: Journal, block: int, patience: float = 5.0, pause: float = 0.1):
        self.journal, self.block, self.patience, self.pause = journal, block, patience, pause
        self.working = 0
        self._waiting: list[tuple[Mapping[str, Any], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Marks that a row is being processed: meanwhile, blocks may wait until they are full."""
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

    async def save(self, row: Mapping[str, Any]) -> None:
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
            block, self._waiting = self._waiting, []
            since = time.monotonic()
            try:
                await asyncio.to_thread(self.journal.write, [row for row, _ in block])
            except Exception as e:  # the rows' own tasks raise it
                for _, safe in block:
                    safe.set_exception(e)
            else:
                for _, safe in block:
                    safe.set_result(None)


def begin(run: Run, stage: str, inputs: dict[str, str]) -> None:
    """Clears the stage's folder of an unfinished attempt, unless that had the same inputs (reuse.py)."""
    note = run.path(stage, FOLDER, "inputs.json")
    try:
        same = files.read_json(note) == inputs
    except (OSError, ValueError):  # the file is missing or damaged
        same = False
    if not same:
        reuse.set_aside(run, stage)
        files.write_json(note, inputs)


def _first_of_each(rows: pa.Table) -> np.ndarray:
    """A mask over rows (`id`, `error`): of each id the first row without an error, or else the first."""
    codes = pc.dictionary_encode(rows["id"].combine_chunks()).indices.to_numpy()
    count = len(codes)
    places = np.arange(count, dtype=np.int32 if count < 1 << 30 else np.int64)
    rank = places + pc.is_valid(rows["error"]).to_numpy() * places.dtype.type(count)  # failed rows come last
    first = np.full_like(places, 2 * count)
    np.minimum.at(first, codes, rank)
    return first[codes] == rank
