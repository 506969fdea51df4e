"""One row is one coroutine: the only place that knows Ray Data.

A chain walks one row through all its engine calls. Rows are read in small slices and mapped over a pool of actors
(actor.py), each with one engine; several slices are open at once, and a semaphore near the engine's own limit bounds
the rows in flight. So there is no barrier between the steps of a chain, and a growing conversation finds its prefix in
the same engine's cache. Finished rows go to a journal (journal.py), so that a kill costs only the rows in flight; the
driver sees no more of a row than its error.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cai_ray.cluster import meter
from cai_ray.cluster.connect import on_gpu
from cai_ray.cluster.interrupt import interruptible
from cai_ray.cluster.placement import ResourceNeed, bundle, check, marks
from cai_ray.cluster.threads import Crowd
from cai_ray.cluster.worker_errors import worker_errors
from cai_ray.config.engine import EngineConfig
from cai_ray.config.judge import PromptedModel
from cai_ray.config.run import RunConfig
from cai_ray.errors import OverBudget
from cai_ray.generate.actor import ChainActor, rows_in_flight
from cai_ray.generate.chain import Chain, Gives, Rows, Takes
from cai_ray.generate.journal import SLICE_ROWS, Journal, Published, Slice
from cai_ray.generate.row_progress import RowProgress, SetProgress
from cai_ray.generate.text_lengths import TextLengths, text_kinds
from cai_ray.storage.models import ResolvedModel
from cai_ray.storage.run import Run


def map_rows(
    run: Run,
    stage: str,
    rows: Iterable[Takes],
    chain: Chain[Takes, Gives],
    *,
    takes: type[Takes],
    gives: type[Gives],
    model: PromptedModel | str,
    name: str = "part",
) -> dict[str, Any]:
    """Runs a chain over rows and writes RUN/stage/`name`-*.parquet, each id once.

    Rows that an earlier, killed attempt finished are taken from the stage's journal.

    Args:
        rows: rows with an `id` of their own, plain data.
        takes: the record of the rows, which the chain takes.
        gives: the record that the chain makes of each.
        model: the engine's model: a role, folder or id, or the settings of a model.

    Returns:
        For the manifest: rows in and out, errors, tokens, calls of engines, lengths of texts
        (`text_lengths.summarise`), engine seconds, engine kind and model.

    Raises:
        InputError: more than `max_error_rate` of the rows failed, or all of the first; the cluster is too small; the
            engine's input is at fault.
        OverBudget: rows are left over; those that were begun are finished and saved.
    """
    sets = {name: Rows(rows, model)}
    return map_sets(run, stage, sets, chain, takes=takes, gives=gives)[name]


def map_sets(
    run: Run,
    stage: str,
    sets: Mapping[str, Rows[Takes]],
    chain: Chain[Takes, Gives],
    *,
    takes: type[Takes],
    gives: type[Gives],
) -> dict[str, dict[str, Any]]:
    """`map_rows` over several sets by name, one after the other, by the same actors: they start once.

    Where the next set has another model, an actor ends its engine and starts one for that model, without importing
    vllm again.
    """
    started = time.time()
    models = {name: run.resolve_model(given.model) for name, given in sets.items()}
    engine, *others = (model.engine for model in models.values())
    assert all(other == engine for other in others), "the actors of all sets are the same"
    check_resources(run.config, engine)
    journals = {name: Journal(run, stage, takes, gives, name) for name in sets}
    finished, slices = Counter[str](), list[Slice]()
    for name, given in sets.items():
        journals[name].merge_leftovers()
        left = _unfinished(given.rows, journals[name].finished_ids(), finished, name)
        slices += journals[name].plan(left, _slice_rows(engine))
    totals = {name: finished[name] + sum(s.rows for s in slices if s.name == name) for name in sets}
    if slices:
        outcomes = _outcomes(run.config, engine, slices, chain, models, journals)
        progress = {
            name: SetProgress(
                stage if name == "part" else f"{stage} {name}",
                total,
                run.config.max_error_rate,
                finished[name],
            )
            for name, total in totals.items()
        }
        _print_finished(finished, progress)
        with interruptible(), worker_errors(), RowProgress(progress):
            _follow(outcomes, progress)
    lengths = {name: TextLengths(text_kinds(chain)) for name in sets}
    published = {name: journal.publish(lengths[name].add) for name, journal in journals.items()}
    seconds = time.time() - started
    return {
        name: _summary(published[name], totals[name], models[name], seconds)
        | {"texts": lengths[name].summary()}
        for name in sets
    }


def _slice_rows(engine: EngineConfig) -> int:
    """A few slices are what an actor has in flight: many small ones cost Ray Data time and memory."""
    return max(SLICE_ROWS, rows_in_flight(engine) // 4)


def _outcomes(
    config: RunConfig,
    engine: EngineConfig,
    slices: list[Slice],
    chain: Chain[Any, Any],
    models: dict[str, ResolvedModel],
    journals: dict[str, Journal],
) -> Any:
    """The dataset of all rows' outcomes (`name`, `processed`, `error`), computed when it is read."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # Set here, since importing Ray Data configures its logging again. An error is raised, and need not be logged too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    gpu, most = on_gpu(engine), max(engine.min_actors, engine.max_actors)
    # Each block is one slice, which the actor reads (docs/decisions.md).
    table = pa.Table.from_pylist([s._asdict() for s in slices])
    source = ray.data.from_blocks([table.slice(i, 1) for i in range(len(slices))])
    return source.map_batches(
        ChainActor,
        fn_constructor_kwargs={
            "chain": chain,
            "models": models,
            "journals": journals,
            "gpu": gpu,
            "crowd": Crowd((ResourceNeed(_actor_bundle(config, engine), most),), spread=True),
        },
        compute=ActorPoolStrategy(
            min_size=engine.min_actors,
            max_size=most,
            # An actor with one slice at a time drains at the slice's end; with several open it stays full.
            max_concurrent_calls_per_actor=2 + 2 * rows_in_flight(engine) // _slice_rows(engine),
        ),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=engine.cpus_per_actor,
        num_gpus=engine.span if gpu else 0,
        resources=marks(config.ray.generation_nodes),
    )


def _unfinished(
    rows: Iterable[Takes], finished: Set[str], counts: Counter[str], name: str
) -> Iterator[Takes]:
    """The rows of a set that no earlier attempt finished; the others are counted under its name."""
    for row in rows:
        if row["id"] in finished:
            counts[name] += 1
        else:
            yield row


def _print_finished(finished: Counter[str], progress: Mapping[str, SetProgress]) -> None:
    for name, count in finished.items():
        current = progress[name]
        line = f"  {current.label}: {count} of {current.total} rows were finished before"
        print(line, file=sys.stderr, flush=True)


def _follow(outcomes: Any, progress: Mapping[str, SetProgress]) -> None:
    """Reads the outcomes as they come.

    Raises:
        InputError: too many rows failed.
        OverBudget: the budget is spent, and rows are left over.
    """
    budget = meter.current()
    for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
        processed = batch.filter(batch["processed"])
        for name in pc.unique(processed["name"]).to_pylist():
            own = pc.equal(processed["name"], name)
            progress[name].add(processed["error"].filter(own).to_pylist())
        if budget and budget.idle():
            break
    if budget and budget.stop_reason and any(p.rows < p.total for p in progress.values()):
        raise OverBudget(budget.stop_reason)


def _summary(published: Published, total: int, model: ResolvedModel, seconds: float) -> dict[str, Any]:
    if published.rows != total:
        raise RuntimeError(f"{total} rows in, {published.rows} out: rows were lost or doubled")
    return {
        "rows_in": total,
        "rows_out": published.rows,
        "errors": published.errors,
        "error_rate": published.errors / total if total else 0.0,
        "tokens": {k: v for k, v in published.usage.items() if k != "calls"},
        "calls": published.usage["calls"],
        "engine_seconds": round(seconds, 2),
        "engine": {"kind": model.engine.kind, "model": model.name, "model_sha": model.sha},
    }


def check_resources(config: RunConfig, engine: EngineConfig) -> None:
    """Checks that the cluster has room for the engines that a stage starts with.

    Raises:
        InputError: it never will have.
    """
    gpu = on_gpu(engine)
    actor = _actor_bundle(config, engine)
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


def _actor_bundle(config: RunConfig, engine: EngineConfig) -> dict[str, float]:
    """The resources that one actor takes on a node."""
    return bundle(engine.cpus_per_actor, engine.span if on_gpu(engine) else 0, config.ray.generation_nodes)
