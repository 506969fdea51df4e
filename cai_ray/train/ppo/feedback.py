"""The feedback model in an actor of its own: it labels responses while a policy trains."""

from __future__ import annotations

import asyncio
from typing import Any

from cai_ray.cluster.connect import worker_env
from cai_ray.cluster.holder import Holder
from cai_ray.cluster.placement import bundle, marks
from cai_ray.config.run import RunConfig
from cai_ray.engine.make import make_engine
from cai_ray.errors import RowError
from cai_ray.generate.label import LabelChain, LabelTask
from cai_ray.prompts.load import load_templates
from cai_ray.storage.run import Run


class FeedbackModel:
    """Labels comparisons as stage `label` does, many in one call."""

    def __init__(self, run: Run, gpu: bool):
        self.held = Holder()
        config = run.config
        templates = load_templates(config.templates)
        self._chain = LabelChain(config.document, templates, config.label, config.seed)
        self._engine = make_engine(run.model(config.label.model), templates, config.engine, gpu)
        self._slots = asyncio.Semaphore(config.engine.max_num_seqs)

    async def prefer(self, rows: list[LabelTask]) -> list[float | None]:
        """The probability that response a is preferred, before `label.clamp`; None if a row cannot be labelled.

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


def actor_resources(run: Run, gpu: bool) -> dict[str, float] | None:
    """The resources that the actor takes on a node; None if PPO does not use the feedback model."""
    watch = run.config.ppo.watch
    return _bundle(run.feedback().config, gpu) if watch.every and watch.asks_feedback else None


def _bundle(config: RunConfig, gpu: bool) -> dict[str, float]:
    engine = config.engine
    return bundle(engine.cpus_per_actor, engine.span if gpu else 0, config.ray.generation_nodes)


def open_feedback(run: Run, gpu: bool) -> Any:
    """Starts the actor in the background. If it dies, Ray starts it again and repeats the call."""
    import ray

    feedback = run.feedback()
    needs = _bundle(feedback.config, gpu)
    actor = ray.remote(FeedbackModel).options(
        num_cpus=needs["CPU"],
        num_gpus=needs.get("GPU", 0),
        resources=marks(feedback.config.ray.generation_nodes),
        max_restarts=-1,
        max_task_retries=2,
        max_concurrency=4,
        runtime_env={"env_vars": worker_env(feedback.config)},
    )
    return actor.remote(feedback, gpu)
