"""The journal of a stage: its finished rows survive a kill.

RUN/stage/journal/NAME/ holds `todo-*.parquet`, the rows to process, and `done-*.parquet`, blocks of finished rows. The
actors write the blocks themselves, so a finished row is safe whichever process dies next; they read the blocks when
they start, so a finished row is not processed again. Blocks begin small, and are merged as they become many
(blocks.py). At the end the rows become RUN/stage/NAME-*.parquet, in the order of their ids, each id once. The journal
is deleted when the stage's manifest is written.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from cai_ray.cluster.usage import Usage
from cai_ray.generate import reuse
from cai_ray.generate.blocks import FAN_IN, FULL_BYTES, Block, Merger, by_size
from cai_ray.storage import files
from cai_ray.storage.arrow import schema_of, to_table, to_tables
from cai_ray.storage.filesystems import read_parquet, resolve
from cai_ray.storage.ids import IdSet
from cai_ray.storage.run import Run
from cai_ray.storage.sorting import SortedWriter
from cai_ray.storage.tables import iter_file, read_rows, take, write_table, write_tables

T = TypeVar("T")

FOLDER = "journal"
TODO_ROWS = 4096
SLICE_ROWS = 64
READERS = 16
_GROUP_BYTES = 16 << 20
"""Size in memory of a row group of merged blocks."""
_ATTEMPTS = 5
_READ_BYTES = 4 << 20
"""Size of the blocks that are read whole, and of those that are read together."""


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
        """Writes the rows to process and returns where they are. Holds at most one slice of them in memory."""
        slices: list[Slice] = []
        tables = to_tables(rows, self.takes, slice_rows)
        for number in count():
            if (first := next(tables, None)) is None:
                return slices
            path = files.join(self.folder, f"todo-{number:05d}.parquet")
            some = chain([first], islice(tables, max(1, TODO_ROWS // slice_rows) - 1))
            written = write_tables(path, some, self.takes)
            slices += [Slice(self.name, path, group, n) for group, n in enumerate(written)]
        raise AssertionError

    def finished_ids(self) -> Set[str]:
        """Ids of the rows that are done. Failed rows are not among them: the cause may be gone at the next attempt."""

        def read() -> IdSet:
            tables = self._done(["id", "error"])
            return IdSet(i for t in tables for i in t.filter(pc.is_null(t["error"]))["id"].to_pylist())

        return _reading_again(read)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> Block:
        """Writes a block of finished rows, all or none of them."""
        path = self._new_path(time.time_ns())
        return Block(resolve(path)[1], write_table(path, to_table(rows, self.gives)))

    def blocks(self) -> list[Block]:
        """The blocks that are there, in the order of their writing."""
        fs, path = resolve(self.folder)
        infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        done = (i for i in infos if i.base_name.startswith("done-") and i.base_name.endswith(".parquet"))
        return sorted(Block(i.path, i.size) for i in done)

    def merge(self, blocks: Sequence[Block]) -> Block | None:
        """Makes one block of several. A kill in between leaves rows twice, which `publish` counts once.

        Returns:
            None if a block is gone: an actor of an earlier attempt, which was not dead yet, has merged it.
        """
        fs, _ = resolve(self.folder)
        written = re.search(r"done-(\d+)", blocks[0].path)  # the merged one stands where the first one stood
        path = self._new_path(int(written[1]) if written else 0)
        tables = (read_rows(fs, block.path) for block in blocks)
        try:
            write_tables(path, _groups_of(tables, _GROUP_BYTES), self.gives)
            for block in blocks:
                fs.delete_file(block.path)
        except FileNotFoundError:
            return None
        place = resolve(path)[1]
        return Block(place, fs.get_file_info(place).size)

    def merge_leftovers(self) -> None:
        """Merges the small blocks that earlier attempts left, if they are many."""
        small = [block for block in self.blocks() if block.bytes < FULL_BYTES]
        if len(small) > FAN_IN:
            for group in by_size(small, FULL_BYTES, len(small)):
                self.merge(group)

    def failed(self, row: Mapping[str, Any], made: Mapping[str, Any], error: str) -> dict[str, Any]:
        """The finished form of a row that failed: the columns that it shares with finished rows, those that were made
        before it failed, and its error."""
        have = {**made, **row, "error": error}
        return {name: have[name] for name in self.gives.names if name in have}

    def publish(self, show: Callable[[pa.Table], None] = lambda table: None) -> Published:
        """Writes NAME-*.parquet in the order of ids, each id once. `show` gets the rows of each part that is written.

        A row that was processed twice (it failed before, or its actor died before it could report it) counts once: the
        first occurrence without an error is taken.
        """
        return _reading_again(lambda: self._publish(show))

    def _publish(self, show: Callable[[pa.Table], None]) -> Published:
        ids = (i for table in self._done(["id"]) for i in table["id"].to_pylist())
        rows, errors, usage = 0, 0, dict.fromkeys(Usage._fields, 0)
        with SortedWriter(self.target, self.gives, ids, self.name) as writer:
            for table in self._done():
                writer.add(table)
            for part in writer.write(_first_of_each):
                show(part)
                rows += part.num_rows
                errors += part.num_rows - part["error"].null_count
                for name in usage:
                    usage[name] += pc.sum(pc.struct_field(part["usage"], name)).as_py() or 0
        return Published(rows, errors, usage)

    def _new_path(self, written: int) -> str:
        return files.join(self.folder, f"done-{written}-{uuid.uuid4().hex[:8]}.parquet")

    def _done(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The finished rows, block by block in the order of their writing. Several small ones are read at a time."""
        fs, _ = resolve(self.folder)
        with ThreadPoolExecutor(READERS) as pool:
            for group in by_size(self.blocks(), _READ_BYTES, 4 * READERS):
                if group[0].bytes > _READ_BYTES:
                    yield from iter_file(fs, group[0].path, columns)
                else:
                    yield from pool.map(lambda block: read_rows(fs, block.path, columns), group)


class JournalWriter:
    """Collects rows that finish one by one and writes them in blocks; runs on the event loop of one actor.

    A block is written when it has `block` rows, when no other row is being processed, or after `patience` seconds,
    but never more often than every `pause` seconds. So a kill costs little more than the rows in flight, and a fast
    chain does not flood the file system with small files. Blocks are merged as they become many.
    """

    def __init__(self, journal: Journal, block: int, patience: float = 5.0, pause: float = 0.1):
        self.journal, self.block, self.patience, self.pause = journal, block, patience, pause
        self.merger = Merger(journal.merge)
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
            self._task = asyncio.create_task(self._write_blocks())
        await safe

    async def _write_blocks(self) -> None:
        since = time.monotonic()
        while self._waiting:
            await asyncio.sleep(self.pause)
            patient = time.monotonic() - since < self.patience
            if len(self._waiting) < self.block and self.working and patient:
                continue
            block, self._waiting = self._waiting, []
            since = time.monotonic()
            try:
                await asyncio.to_thread(self.write, [row for row, _ in block])
            except Exception as e:  # the rows' own tasks raise it
                for _, safe in block:
                    safe.set_exception(e)
            else:
                for _, safe in block:
                    safe.set_result(None)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a block, and merges what is due."""
        # Merged before the rows count as saved: when all rows do, nobody moves blocks any more.
        self.merger.add(self.journal.write(rows))


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


def _reading_again(read: Callable[[], T]) -> T:
    """Reads a journal whose blocks an actor may merge meanwhile: the rows of one that is gone stand in a newer one."""
    for attempt in count():
        try:
            return read()
        except FileNotFoundError:
            if attempt == _ATTEMPTS:
                raise
    raise AssertionError


def _groups_of(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of some `size` bytes in memory."""
    waiting: list[pa.Table] = []
    total = 0
    for table in tables:
        waiting.append(table)
        total += table.nbytes
        if total >= size:
            yield pa.concat_tables(waiting)
            waiting, total = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _first_of_each(rows: pa.Table) -> pa.Table:
    """Of each id the first row without an error, or else the first; rows of one id follow one another."""
    ids, failed = rows["id"].to_pylist(), pc.is_valid(rows["error"]).to_pylist()
    first: dict[str, int] = {}
    for place, id in enumerate(ids):
        if id not in first or (failed[first[id]] and not failed[place]):
            first[id] = place
    return rows if len(first) == len(ids) else take(rows, pa.array(first.values(), pa.int64()))
