"""The Ray Data actor: one engine, and as many rows in flight as it can take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pyarrow as pa

from cai_ray.cluster.connect import prepare_engine
from cai_ray.cluster.holder import Holder
from cai_ray.cluster.threads import Crowd
from cai_ray.cluster.usage import Usage
from cai_ray.config.engine import EngineConfig
from cai_ray.engine.make import make_engine
from cai_ray.engine.metered import Metered
from cai_ray.errors import RowError
from cai_ray.generate.chain import Chain
from cai_ray.generate.journal import Journal, JournalWriter, Slice
from cai_ray.generate.row_counts import RowCounts
from cai_ray.storage.models import ResolvedModel


def rows_in_flight(engine: EngineConfig) -> int:
    """Rows that an actor processes at a time: a few more than the engine takes, so that its queue is never empty."""
    return engine.max_num_seqs + engine.max_num_seqs // 4


class Outcome(NamedTuple):
    """What an actor tells the driver about one row."""

    processed: bool
    """False where the budget was spent before the row's turn."""
    error: str | None = None


class ChainActor:
    """Walks rows of several sets through a chain, each set with the engine of its model.

    Args:
        models: each set's model; their engines have the same settings.
        journals: each set's journal.
        crowd: the actors of the stage; None if there is only this one.
    """

    def __init__(
        self,
        chain: Chain[Any, Any],
        models: dict[str, ResolvedModel],
        journals: dict[str, Journal],
        gpu: bool,
        crowd: Crowd | None = None,
    ):
        self.counts = RowCounts()
        self.held = Holder(self.counts.report)
        self.chain, self.models, self.gpu = chain, models, gpu
        self.model = next(iter(models.values()))
        prepare_engine(self.model.engine, gpu, crowd)
        self.engine = make_engine(self.model, self.gpu)
        self.counts.engine_starts(self.engine)
        self.held.ready()
        self.open_slices = 0
        self.slice_closed = asyncio.Condition()
        in_flight = rows_in_flight(self.model.engine)
        self.slots = asyncio.Semaphore(in_flight)
        # Bounds the rows that a kill would cost: where the disk is slow, the engine waits for it.
        self.unsaved = asyncio.Semaphore(in_flight + max(1, in_flight // 2))
        self.journals = journals
        self.writers = {n: JournalWriter(j, block=max(1, in_flight // 4)) for n, j in journals.items()}
        self.fault: Exception | None = None
        # Read after the engine has started: by then the journal has what other actors, or this one before it died,
        # have finished.
        self.finished_ids = {n: journal.finished_ids() for n, journal in journals.items()}

    async def __call__(self, batch: pa.Table) -> Any:
        """Processes the slice that a batch of one row names, and yields a row (`name`, `processed`, `error`) for each
        of its rows."""
        slice = Slice(**batch.to_pylist()[0])
        outcomes = [Outcome(False)]
        if not self.held.stop_reason:
            rows = await asyncio.to_thread(slice.read)
            left = [row for row in rows if row["id"] not in self.finished_ids[slice.name]]
            outcomes = [Outcome(True)] * (len(rows) - len(left))
            if left:
                async with self._engine_of(self.models[slice.name]):
                    outcomes += await asyncio.gather(*(self._process(row, slice.name) for row in left))
                if not self.held.working:
                    await asyncio.to_thread(self.held.report_now)
        processed, errors = zip(*outcomes, strict=True)
        yield pa.table(
            {
                "name": [slice.name] * len(outcomes),
                "processed": pa.array(processed, pa.bool_()),
                "error": pa.array(errors, pa.string()),
            }
        )

    @asynccontextmanager
    async def _engine_of(self, model: ResolvedModel) -> AsyncIterator[None]:
        """Waits until no slice of another model is open, and then has the engine changed, once."""
        async with self.slice_closed:
            await self.slice_closed.wait_for(lambda: self.model == model or not self.open_slices)
            if self.model != model and not self.held.stop_reason:
                since = time.monotonic()
                self.counts.engine_ends()
                await self.engine.close()
                self.model = model
                self.engine = make_engine(self.model, self.gpu)
                self.counts.engine_starts(self.engine)
                self.held.ready(since)
            self.open_slices += 1
        try:
            yield
        finally:
            async with self.slice_closed:
                self.open_slices -= 1
                self.slice_closed.notify_all()

    async def _process(self, row: dict[str, Any], name: str) -> Outcome:
        """Walks a row of the set `name` through the chain and saves what it became."""
        writer = self.writers[name]
        async with self.unsaved:
            with self.held.work():
                async with self.slots:
                    if self.fault:  # the stage has ended, but Ray Data lets its actors live on for seconds
                        raise self.fault
                    if self.held.stop_reason:
                        return Outcome(False)
                    with writer.busy(), self.counts.under_way():
                        result = await self._walk(engine := Metered(self.engine), row, self.journals[name])
                await writer.save(result)
                # What the row's own column counts may be of an earlier pass as well.
                self.counts.finish(name, result.get("error") is not None, engine.usage.generated)
        return Outcome(True, result.get("error"))

    async def _walk(self, engine: Metered, row: dict[str, Any], journal: Journal) -> Mapping[str, Any]:
        try:
            return await self.chain(engine, row)
        except RowError as e:
            return journal.failed(row, {"usage": Usage(*e.spent).as_record(), **e.made}, str(e))
        except Exception as e:
            self.fault = e
            raise
