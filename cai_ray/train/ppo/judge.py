"""A judge in an actor of its own: it compares responses while a policy trains."""

from __future__ import annotations

import asyncio
from typing import Any

from cai_ray.cluster.connect import on_gpu, prepare_engine
from cai_ray.cluster.holder import Holder
from cai_ray.cluster.placement import bundle, marks
from cai_ray.cluster.threads import Crowd
from cai_ray.engine.make import make_engine
from cai_ray.errors import RowError
from cai_ray.generate.label import LabelTask, make_judge
from cai_ray.storage.run import Run


class WatchJudge:
    """Compares responses as stage `label` does, by the judge of the watch, many in one call."""

    def __init__(self, run: Run, gpu: bool, crowd: Crowd):
        self.held = Holder()
        model = run.resolve_model(run.config.watch_judge)
        prepare_engine(model.engine, gpu, crowd)
        self._chain = make_judge(run, run.config.watch_judge)
        self._engine = make_engine(model, gpu)
        self._slots = asyncio.Semaphore(model.engine.max_num_seqs)

    async def prefer(self, rows: list[LabelTask]) -> list[float | None]:
        """The probability that response a is preferred, before the judge's `clamp`; None if a row cannot be judged.

        Args:
            rows: `id`, `messages`, `response_a` and `response_b` of each comparison.
        """

        async def one(row: LabelTask) -> float | None:
            async with self._slots:
                try:
                    return (await self._chain(self._engine, row))["p_a_raw"]
                except RowError:
                    return None

        return list(await asyncio.gather(*map(one, rows)))


def actor_resources(run: Run) -> dict[str, float] | None:
    """The resources that the actor takes on a node; None if PPO asks no judge."""
    if not run.config.ppo.watch.asks_judge:
        return None
    engine = run.resolve_model(run.config.watch_judge).engine
    return bundle(
        engine.cpus_per_actor, engine.span if on_gpu(engine) else 0, run.config.ray.generation_nodes
    )


def open_judge(run: Run, needs: dict[str, float], crowd: Crowd) -> Any:
    """Starts the actor in the background. If it dies, Ray starts it again and repeats the call."""
    import ray

    engine = run.resolve_model(run.config.watch_judge).engine
    actor = ray.remote(WatchJudge).options(
        num_cpus=needs["CPU"],
        num_gpus=needs.get("GPU", 0),
        resources=marks(run.config.ray.generation_nodes),
        max_restarts=-1,
        max_task_retries=2,
        max_concurrency=4,
    )
    return actor.remote(run, on_gpu(engine), crowd)
