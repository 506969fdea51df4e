"""One row is one coroutine: the only place that knows Ray Data.

A chain walks one row through all its engine calls. Rows are read in small blocks and mapped over a pool of actors,
each with one engine; several batches of a block are open at once, and a semaphore near the engine's own limit
bounds the rows in flight. So there is no barrier between the steps of a chain, and a conversation that grows finds
its prefix in the same engine's cache.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray import storage
from cai_ray.cluster import capacity, uses_gpu, worker_env
from cai_ray.config import EngineConfig
from cai_ray.engine import Engine, make_engine
from cai_ray.errors import InputError, RowError
from cai_ray.prompts import load_templates
from cai_ray.records import SCHEMAS, to_table
from cai_ray.storage import Run

_BLOCK_ROWS = 128
_BATCH_ROWS = 16
# An actor that runs one block at a time drains at the block's end; with several open it stays full.
_OPEN_BLOCKS = 8


class Chain(Protocol):
    """Walks one row through its engine calls. Picklable; the row it returns has the stage's columns."""

    def __call__(self, engine: Engine, row: dict[str, Any]) -> Awaitable[dict[str, Any]]: ...


def map_rows(
    run: Run,
    stage: str,
    rows: list[dict[str, Any]],
    chain: Chain,
    *,
    model: str,
    schema: str,
    name: str = "part",
) -> dict[str, Any]:
    """Runs a chain over rows and writes RUN/stage/`name`-*.parquet.

    Args:
        rows: rows with an `id`, plain data.
        model: the engine's model, by role, folder or id (`Run.model`).
        schema: the schema of what the chain returns (cai_ray.records).

    Returns:
        For the manifest: rows in and out, errors, tokens, engine seconds, engine kind and model.

    Raises:
        InputError: more than `max_error_rate` of the rows failed, or the cluster is too small.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # Set here, since importing Ray Data configures its logging anew. What fails is raised, and need not be said twice.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    config = run.config
    started = time.time()
    gpu = uses_gpu(config)
    check_resources(config.engine, gpu)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An error of one row is the chain's to record; one of the code or the engine ends the stage.
    source = ray.data.from_arrow(_as_table(rows)).repartition(target_num_rows_per_block=_BLOCK_ROWS)
    target = run.path(stage)
    done = source.map_batches(
        _Worker,
        fn_constructor_kwargs={"chain": chain, "run": run, "model": model, "schema": schema, "gpu": gpu},
        compute=ActorPoolStrategy(
            min_size=config.engine.min_actors,
            max_size=max(config.engine.min_actors, config.engine.max_actors),
            max_concurrent_calls_per_actor=_OPEN_BLOCKS,
        ),
        batch_size=_BATCH_ROWS,
        batch_format="pyarrow",
        num_cpus=config.engine.cpus_per_actor,
        num_gpus=config.engine.tensor_parallel if gpu else 0,
        runtime_env={"env_vars": worker_env(config)},
    )
    with _Progress(stage if name == "part" else f"{stage} {name}", target, name, len(rows)):
        fs, path = storage.resolve(target)
        done.write_parquet(path, filesystem=fs, filename_provider=_part_names(name))
    return _summary(
        run, storage.read_tables(target, ["error", "usage"], name), rows, model, time.time() - started
    )


class _Worker:
    """A Ray Data actor: one engine, and as many rows in flight as it takes."""

    def __init__(self, chain: Chain, run: Run, model: str, schema: str, gpu: bool):
        config = run.config
        self.engine = make_engine(run.model(model), load_templates(config.templates), config.engine, gpu)
        self.chain = chain
        self.schema = schema
        self.slots = asyncio.Semaphore(config.engine.max_num_seqs + config.engine.max_num_seqs // 4)

    async def __call__(self, batch: pa.Table) -> Any:
        yield to_table(await asyncio.gather(*(self._row(row) for row in batch.to_pylist())), self.schema)

    async def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        async with self.slots:
            try:
                return await self.chain(self.engine, row)
            except RowError as e:
                return {**row, "error": str(e)}


def _summary(
    run: Run, table: pa.Table, rows: list[dict[str, Any]], model: str, seconds: float
) -> dict[str, Any]:
    if table.num_rows != len(rows):
        raise RuntimeError(f"{len(rows)} rows in, {table.num_rows} out: rows were lost or doubled")
    errors = table.num_rows - table["error"].null_count
    if rows and errors / len(rows) > run.config.max_error_rate:
        counts = pc.value_counts(table["error"].drop_null()).to_pylist()
        worst = max(counts, key=lambda c: c["counts"])
        raise InputError(
            f"{errors} of {len(rows)} rows failed, more than max_error_rate={run.config.max_error_rate}; "
            f"most often: {worst['values']} ({worst['counts']} rows)"
        )
    usage = table["usage"].combine_chunks()
    tokens = {n: pc.sum(pc.struct_field(usage, n)).as_py() or 0 for n in ("prompt", "cached", "generated")}
    return {
        "rows_in": len(rows),
        "rows_out": table.num_rows,
        "errors": errors,
        "error_rate": errors / len(rows) if rows else 0.0,
        "tokens": tokens,
        "engine_seconds": round(seconds, 2),
        "engine": {
            "kind": run.config.engine.kind,
            "model": model,
            "model_sha": storage.model_sha(run.model(model)),
        },
    }


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = {k for row in rows for k in row}
    known = {f.name: f for s in SCHEMAS.values() for f in s}
    fields = pa.schema([known[n] if n in known else pa.field(n, pa.string()) for n in sorted(names)])
    return pa.Table.from_pylist(rows, schema=fields)


def _part_names(name: str) -> Any:
    from ray.data.datasource import FilenameProvider

    class PartNames(FilenameProvider):
        def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
            return f"{name}-{task_index:05d}-{write_uuid}.parquet"

    return PartNames()


def check_resources(engine: EngineConfig, gpu: bool) -> None:
    """Short of resources Ray waits for ever without a word; this says so at once."""
    have = capacity()
    need = {
        "CPU": engine.cpus_per_actor * engine.min_actors,
        "GPU": engine.tensor_parallel * engine.min_actors,
    }
    for kind in ("CPU", "GPU") if gpu else ("CPU",):
        if have.get(kind, 0) < need[kind]:
            raise InputError(
                f"engine: {engine.min_actors} actors need {need[kind]:g} {kind}s, "
                f"the cluster has {have.get(kind, 0):g}; lower engine.min_actors or engine.tensor_parallel"
            )


class _Progress:
    """A line on stderr every few seconds: rows written so far."""

    def __init__(self, label: str, target: str, name: str, total: int):
        self.label, self.target, self.name, self.total = label, target, name, total
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        import pyarrow.parquet as pq

        started = time.time()
        counted: dict[str, int] = {}
        fs, _ = storage.resolve(self.target)
        while not self.stop.wait(5):
            for path in storage.list_files(self.target, ".parquet"):
                if path not in counted and path.rsplit("/", 1)[1].startswith(f"{self.name}-"):
                    try:
                        counted[path] = pq.read_metadata(path, filesystem=fs).num_rows
                    except (OSError, pa.ArrowException):  # still being written
                        continue
            rows = sum(counted.values())
            elapsed = time.time() - started
            left = f", {elapsed * (self.total - rows) / rows:.0f} s left" if rows else ""
            print(
                f"  {self.label}: {rows} of {self.total} rows, {elapsed:.0f} s{left}",
                file=sys.stderr,
                flush=True,
            )
