"""One row is one coroutine: the only place that knows Ray Data.

A chain walks one row through all its engine calls. Rows are read in small slices and mapped over a pool of actors,
each with one engine; several slices are open at once, and a semaphore near the engine's own limit bounds the rows in
flight. So there is no barrier between the steps of a chain, and a conversation that grows finds
its prefix in the same engine's cache. What is finished is kept in a journal (journal.py), so that a kill costs the
rows in flight, and the driver sees no more of a row than its error.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.cluster import meter
from cai_ray.cluster.connect import uses_gpu, worker_env
from cai_ray.cluster.holder import Holder
from cai_ray.cluster.interrupt import interruptible
from cai_ray.cluster.placement import ResourceNeed, bundle, check, marks
from cai_ray.cluster.progress import POLL_S, Progress, ProgressDisplay
from cai_ray.cluster.worker_errors import worker_errors
from cai_ray.config.engine import EngineConfig
from cai_ray.config.run import RunConfig
from cai_ray.engine.make import make_engine
from cai_ray.engine.protocol import Engine
from cai_ray.errors import InputError, OverBudget, RowError
from cai_ray.generate.journal import SLICE_ROWS, Journal, Keeper, Published, Slice
from cai_ray.prompts.load import load_templates
from cai_ray.storage.models import model_sha
from cai_ray.storage.run import Run

# So many first rows that fail are no accident.
_ALL_FAIL = 64


class Chain(Protocol):
    """Walks one row through its engine calls. Picklable; the row it returns has the stage's columns."""

    def __call__(self, engine: Engine, row: dict[str, Any]) -> Awaitable[dict[str, Any]]: ...


def map_rows(
    run: Run,
    stage: str,
    rows: Iterable[dict[str, Any]],
    chain: Chain,
    *,
    model: str,
    schema: str,
    name: str = "part",
) -> dict[str, Any]:
    """Runs a chain over rows and writes RUN/stage/`name`-*.parquet, each id once.

    What an attempt that was killed had finished is in the stage's journal, and is not done again.

    Args:
        rows: rows with an `id` of their own, plain data.
        model: the engine's model, by role, folder or id (`Run.model`).
        schema: the schema of what the chain returns (cai_ray.storage.records).

    Returns:
        For the manifest: rows in and out, errors, tokens, calls of engines, engine seconds, engine kind and model.

    Raises:
        InputError: more than `max_error_rate` of the rows failed, or all of the first; the cluster is too small; the
            engine's input is at fault.
        OverBudget: rows are left; those that were begun are finished and kept.
    """
    return map_sets(run, stage, {name: Rows(rows, model)}, chain, schema=schema)[name]


class Rows(NamedTuple):
    """Rows with an `id` of their own, plain data; and their model, by role, folder or id (`Run.model`)."""

    rows: Iterable[dict[str, Any]]
    model: str


def map_sets(
    run: Run, stage: str, sets: Mapping[str, Rows], chain: Chain, *, schema: str
) -> dict[str, dict[str, Any]]:
    """`map_rows` over several sets by name, one after the other, by the same actors: they start once.

    Where the next set has another model, an actor ends its engine and starts one for that: without importing vllm anew.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # Set here, since importing Ray Data configures its logging anew. What fails is raised, and need not be said twice.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    config = run.config
    started = time.time()
    gpu = uses_gpu(config)
    check_resources(config, gpu)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    journals = {name: Journal(run, stage, schema, name) for name in sets}
    # A few slices are what an actor has in flight: many small ones cost Ray Data time and memory.
    size = max(SLICE_ROWS, _in_flight(config.engine) // 4)
    slices = [s for name, given in sets.items() for s in journals[name].plan(given.rows, size)]
    totals = {name: sum(s.rows for s in slices if s.name == name) for name in sets}

    def publish() -> dict[str, dict[str, Any]]:
        made = {name: journal.publish() for name, journal in journals.items()}
        seconds = time.time() - started
        return {name: _summary(run, made[name], totals[name], sets[name].model, seconds) for name in sets}

    if not slices:
        return publish()
    # Each block is one slice, which the actor reads (docs/decisions.md).
    table = pa.Table.from_pylist([s._asdict() for s in slices])
    source = ray.data.from_blocks([table.slice(i, 1) for i in range(len(slices))])
    # An error of one row is the chain's to record; one of the code or the engine ends the stage.
    done = source.map_batches(
        _Worker,
        fn_constructor_kwargs={
            "chain": chain,
            "run": run,
            "models": {name: given.model for name, given in sets.items()},
            "journals": journals,
            "gpu": gpu,
        },
        compute=ActorPoolStrategy(
            min_size=config.engine.min_actors,
            max_size=max(config.engine.min_actors, config.engine.max_actors),
            # An actor that walks one slice at a time drains at the slice's end; with several open it stays full.
            max_concurrent_calls_per_actor=2 + 2 * _in_flight(config.engine) // size,
        ),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=config.engine.cpus_per_actor,
        num_gpus=config.engine.span if gpu else 0,
        resources=marks(config.ray.generation_nodes),
        runtime_env={"env_vars": worker_env(config)},
    )
    errors = {
        name: _Errors(stage if name == "part" else f"{stage} {name}", total, config.max_error_rate)
        for name, total in totals.items()
    }
    for name, journal in journals.items():
        if kept := len(journal.finished()):
            line = f"  {errors[name].label}: {kept} of {totals[name]} rows were finished before"
            print(line, file=sys.stderr, flush=True)
    with interruptible(), worker_errors(), _RowProgress(list(errors.values())):
        counted = meter.current()
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            walked = batch.filter(batch["walked"])
            for name in pc.unique(walked["name"]).to_pylist():
                errors[name].add(walked["error"].filter(pc.equal(walked["name"], name)).to_pylist())
            if counted and counted.idle():
                break
        if counted and counted.stop_reason and any(e.rows < e.total for e in errors.values()):
            raise OverBudget(counted.stop_reason)
        return publish()


class _Worker:
    """A Ray Data actor: one engine, and as many rows in flight as it takes."""

    def __init__(
        self, chain: Chain, run: Run, models: dict[str, str], journals: dict[str, Journal], gpu: bool
    ):
        self.held = Holder()
        self.chain, self.run, self.models, self.gpu = chain, run, models, gpu
        self.model = next(iter(models.values()))
        self.engine = self._make_engine()
        self.held.ready()
        self.open = 0
        self.closed = asyncio.Condition()
        in_flight = _in_flight(run.config.engine)
        self.slots = asyncio.Semaphore(in_flight)
        # Rows that a kill would cost: where the disk is slow, the engine waits before more than these are at stake.
        self.at_stake = asyncio.Semaphore(in_flight + max(1, in_flight // 2))
        self.keepers = {n: Keeper(journal, block=max(1, in_flight // 4)) for n, journal in journals.items()}
        self.fault: Exception | None = None
        # After the engine: what another actor, or this one before it died, has finished until now.
        self.finished = {n: journal.finished() for n, journal in journals.items()}

    def _make_engine(self) -> Engine:
        config = self.run.config
        return make_engine(
            self.run.model(self.model), load_templates(config.templates), config.engine, self.gpu
        )

    async def __call__(self, batch: pa.Table) -> Any:
        slice = Slice(**batch.to_pylist()[0])
        done: list[tuple[bool, str | None]] = [(False, None)]
        if not self.held.stop_reason:
            rows = await asyncio.to_thread(slice.read)
            left = [row for row in rows if row["id"] not in self.finished[slice.name]]
            done = [(True, None)] * (len(rows) - len(left))
            if left:
                async with self._engine_of(self.models[slice.name]):
                    done += await asyncio.gather(*(self._row(row, self.keepers[slice.name]) for row in left))
                if not self.held.working:
                    await asyncio.to_thread(self.held.report_now)
        walked, errors = zip(*done, strict=True)
        yield pa.table(
            {
                "name": [slice.name] * len(done),
                "walked": pa.array(walked, pa.bool_()),
                "error": pa.array(errors, pa.string()),
            }
        )

    @asynccontextmanager
    async def _engine_of(self, model: str) -> AsyncIterator[None]:
        """Waits until no slice of another model is open, and then has the engine changed, once."""
        async with self.closed:
            await self.closed.wait_for(lambda: self.model == model or not self.open)
            if self.model != model and not self.held.stop_reason:
                since = time.monotonic()
                await self.engine.close()
                self.model = model
                self.engine = self._make_engine()
                self.held.ready(since)
            self.open += 1
        try:
            yield
        finally:
            async with self.closed:
                self.open -= 1
                self.closed.notify_all()

    async def _row(self, row: dict[str, Any], keeper: Keeper) -> tuple[bool, str | None]:
        """Whether it was walked, and what failed it."""
        async with self.at_stake:
            with self.held.work():
                async with self.slots:
                    if self.fault:  # the stage has ended, and Ray Data lets its actors live on for seconds
                        raise self.fault
                    if self.held.stop_reason:
                        return False, None
                    with keeper.busy():
                        try:
                            row = await self.chain(self.engine, row)
                        except RowError as e:
                            row = {**row, "error": str(e)}
                        except Exception as e:
                            self.fault = e
                            raise
                await keeper.keep(row)
        return True, row.get("error")


def _in_flight(engine: EngineConfig) -> int:
    """Rows at a time in an actor: a few more than the engine takes, so that one always waits for a place."""
    return engine.max_num_seqs + engine.max_num_seqs // 4


class _Errors:
    """Rows of a set that came back, and what failed of them. Ends a stage as soon as it is known that it will fail."""

    def __init__(self, label: str, total: int, rate: float):
        self.label, self.total, self.rate, self.rows = label, total, rate, 0
        self.kinds: Counter[str] = Counter()

    def add(self, errors: list[str | None]) -> None:
        self.rows += len(errors)
        self.kinds.update(e for e in errors if e is not None)
        failed = self.kinds.total()
        if failed > self.rate * self.total or failed == self.rows >= _ALL_FAIL > self.rate * _ALL_FAIL:
            worst, count = self.kinds.most_common(1)[0]
            of = (
                f"{self.total} rows"
                if self.rows == self.total
                else f"the first {self.rows} rows of {self.total}"
            )
            raise InputError(
                f"{failed} of {of} failed, more than max_error_rate={self.rate}; most often: {worst} ({count} rows)"
            )


def _summary(run: Run, made: Published, total: int, model: str, seconds: float) -> dict[str, Any]:
    if made.rows != total:
        raise RuntimeError(f"{total} rows in, {made.rows} out: rows were lost or doubled")
    return {
        "rows_in": total,
        "rows_out": made.rows,
        "errors": made.errors,
        "error_rate": made.errors / total if total else 0.0,
        "tokens": {k: v for k, v in made.usage.items() if k != "calls"},
        "calls": made.usage["calls"],
        "engine_seconds": round(seconds, 2),
        "engine": {
            "kind": run.config.engine.kind,
            "model": model,
            "model_sha": model_sha(run.model(model)),
        },
    }


def check_resources(config: RunConfig, gpu: bool) -> None:
    """Whether the engines that a stage starts with have room.

    Raises:
        InputError: they never will have.
    """
    engine = config.engine
    actor = bundle(engine.cpus_per_actor, engine.span if gpu else 0, config.ray.generation_nodes)
    lower = (
        "engine.min_actors, engine.tensor_parallel or engine.pipeline_parallel"
        if gpu
        else "engine.min_actors"
    )
    check(
        config,
        f"engine.min_actors={engine.min_actors}",
        [ResourceNeed(actor, engine.min_actors)],
        f"lower {lower}, or use larger nodes",
    )


class _RowProgress:
    """Shows on stderr how many rows are done, of the set that is being walked."""

    def __init__(self, sets: list[_Errors]):
        self.sets = sets
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        started = time.time()
        with ProgressDisplay() as display:
            while not self.stop.wait(POLL_S if display.drawn else 5):
                display.show(self._progress(time.time() - started))

    def _progress(self, elapsed: float) -> Progress:
        current = next((s for s in self.sets if s.rows < s.total), self.sets[-1])
        rows, total = (sum(n) for n in zip(*((s.rows, s.total) for s in self.sets), strict=True))
        failed = [f"{current.kinds.total()} failed"] if current.kinds else []
        left = [f"{elapsed * (total - rows) / rows:.0f} s left"] if rows else []
        return Progress(
            current.label,
            current.rows,
            current.total,
            "rows",
            ", ".join([f"{rows / elapsed:.1f} rows/s", *failed, *left]),
            ", ".join(
                [
                    f"{current.label}: {current.rows} of {current.total} rows",
                    *failed,
                    f"{elapsed:.0f} s",
                    *left,
                ]
            ),
        )
