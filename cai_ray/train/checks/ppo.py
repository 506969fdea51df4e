"""Checks of stage `ppo`."""

from __future__ import annotations

from cai_ray.cluster.connect import uses_gpu
from cai_ray.config.ppo import JUDGE
from cai_ray.data.preflight import Preflight
from cai_ray.errors import InputError
from cai_ray.stages import ROLES
from cai_ray.storage.run import Run


def check(run: Run, preflight: Preflight) -> None:
    """Checks engines, weight sync, reward models and prompts.

    Raises:
        InputError: one of them cannot be used, or a prompt of `ppo.watch` is also a training prompt.
    """
    config, ppo = run.config, run.config.ppo
    if "ppo" in preflight.stages:
        if config.engine.pipeline_parallel > 1:
            raise InputError(
                f"engine.pipeline_parallel={config.engine.pipeline_parallel}: PPO sends its weights to "
                "engines that hold all layers; use engine.tensor_parallel, or stop earlier with --until rm"
            )
        if ppo.weight_sync != "ray" and ppo.weight_sync == ("gloo" if uses_gpu(config) else "nccl"):
            raise InputError(
                f"ppo.weight_sync={ppo.weight_sync}: nccl is for GPUs and gloo for CPUs; use the other, or ray"
            )
        for model in [*(source.model for source in ppo.rewards), ppo.watch.opinion]:
            if model not in (*ROLES, JUDGE):
                preflight.renderer(model)
    if ppo.watch.asks_judge:
        key = "ppo.watch.judge" if ppo.watch.judge else "label.judge"
        preflight.check_judge(key, config.watch_judge, "ppo")
    preflight.trains_on_prompts("ppo.prompts", ppo.prompts, ppo.max_tokens)
    if ppo.watch.every and "ppo" in preflight.stages:
        preflight.evaluates_on_prompts("ppo.watch.prompts", ppo.watch.prompts, ppo.max_tokens)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for workers, engines and the judge at once."""
    from cai_ray.train.ppo import engine_owner, judge
    from cai_ray.train.runtime.group import check_resources

    gpu = uses_gpu(run.config)
    check_resources(run, run.config.ppo)
    engine_owner.check_room(run.config, gpu, judge.actor_resources(run))
