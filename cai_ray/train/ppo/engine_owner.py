"""Makes and owns the rollout engines: vLLM in Ray actors of their own, in a placement group.

The driver makes the `EngineOwner` before training starts, because actors made by a training worker would die with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cai_ray.cluster.connect import prepare_engine
from cai_ray.cluster.placement import ResourceNeed, bundle, check, marks
from cai_ray.cluster.threads import Crowd
from cai_ray.config.run import RunConfig
from cai_ray.storage.models import local_model
from cai_ray.train.ppo.rollout_engine import RolloutEngine
from cai_ray.train.weights.send import Way


class EngineSpec(NamedTuple):
    """Makes engine number i in its bundle of the placement group."""

    model: str
    arguments: dict[str, Any]
    end_id: int
    group: Any
    cpus: float
    gpus: float
    mark: dict[str, float]
    way: Way
    prepare: Callable[[], None]

    def __call__(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        actor = ray.remote(RolloutEngine).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            resources=self.mark,
            max_restarts=0,
            scheduling_strategy=place,
        )
        return actor.remote(self.model, self.arguments, self.end_id, self.way, self.prepare)


class EngineOwner:
    """Owns the engines and counts the epochs. It is an actor of the driver and outlives training workers."""

    def __init__(self, make: EngineSpec, engines: int):
        self._make = make
        self._engines = [make(i) for i in range(engines)]
        self._epoch = 0

    def join(self) -> tuple[int, list[Any]]:
        """Begins a new epoch; returns its number and the engines."""
        self._epoch += 1
        return self._epoch, self._engines

    def replace(self, index: int) -> Any:
        """Kills an engine and makes another in its place; returns the new one."""
        import ray

        ray.kill(self._engines[index])
        self._engines[index] = self._make(index)
        return self._engines[index]

    def close(self) -> None:
        """Kills all engines and removes their placement group."""
        import ray
        import ray.util

        for engine in self._engines:
            ray.kill(engine)
        ray.util.remove_placement_group(self._make.group)


def open_engines(
    config: RunConfig, model: str, end_id: int, gpu: bool, beside: Mapping[str, float] | None = None
) -> Any:
    """Starts `ppo.rollout_engines` engines in the background; returns their owner, for the driver to hold.

    Args:
        model: the folder or URI that the policy starts from.
        end_id: the token that ends a turn.
        beside: the resources of the judge, if the stage needs one too (`judge.actor_resources`).

    Raises:
        InputError: the cluster will never have room for everything.
    """
    import ray
    from ray.util.placement_group import placement_group

    from cai_ray.engine.vllm import engine_args

    check_room(config, gpu, beside)
    engine, ppo = config.rollout_engine, config.ppo
    place = _engine_bundle(config, gpu)
    arguments = engine_args(local_model(model), engine, gpu)
    group = placement_group([place] * ppo.rollout_engines, strategy="PACK")
    mark = marks(config.ray.training_nodes)
    crowd = Crowd(tuple(needs_of(config, gpu, beside)))
    spec = EngineSpec(
        model,
        arguments,
        end_id,
        group,
        place["CPU"],
        place.get("GPU", 0),
        mark,
        ppo.weight_sync,
        functools.partial(prepare_engine, engine, gpu, crowd),
    )
    return ray.remote(EngineOwner).options(num_cpus=0).remote(spec, ppo.rollout_engines)


def check_room(config: RunConfig, gpu: bool, beside: Mapping[str, float] | None = None) -> None:
    """Checks that engines and training workers fit the cluster together: otherwise one waits for the other forever.

    Args:
        beside: the resources of the judge, if the stage needs one too (`judge.actor_resources`).

    Raises:
        InputError: the cluster will never have room for everything.
    """
    ppo = config.ppo
    what = f"ppo.rollout_engines={ppo.rollout_engines} and ppo.workers={ppo.workers}"
    check(config, what, needs_of(config, gpu, beside), "use fewer of them, or more nodes")


def needs_of(config: RunConfig, gpu: bool, beside: Mapping[str, float] | None = None) -> list[ResourceNeed]:
    """What computes in the stage: engines, training workers, and the judge (`beside`) if the stage needs one."""
    ppo = config.ppo
    worker = bundle(ppo.cpus_per_worker, 1 if gpu else 0, config.ray.training_nodes)
    engines = ResourceNeed(_engine_bundle(config, gpu), ppo.rollout_engines)
    return [engines, ResourceNeed(worker, ppo.workers), *([ResourceNeed(beside, 1)] if beside else [])]


def _engine_bundle(config: RunConfig, gpu: bool) -> dict[str, float]:
    engine = config.rollout_engine
    return bundle(engine.cpus_per_actor, engine.tensor_parallel if gpu else 0, config.ray.training_nodes)


def close_engines(owner: Any) -> None:
    """Ends the engines and frees their resources."""
    import ray

    ray.get(owner.close.remote(), timeout=60)
    ray.kill(owner)
