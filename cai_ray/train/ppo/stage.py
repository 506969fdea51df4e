"""Stage `ppo`, the driver's side: it reads the prompts, starts engines and training group, and ends both.

The RL-CAI policy starts from the SL-CAI policy and is trained against the reward model (Bai et al. 2022, section 4);
loop.py is what runs on every rank.
"""

from __future__ import annotations

from typing import Any

from cai_ray.cluster.connect import uses_gpu
from cai_ray.cluster.threads import Crowd
from cai_ray.data.left_out import LeftOut
from cai_ray.storage.models import folder_sha, model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.train.ppo import judge
from cai_ray.train.ppo.engine_owner import close_engines, needs_of, open_engines
from cai_ray.train.ppo.loop import loop
from cai_ray.train.ppo.prompts import policy_renderer, read_training_prompts
from cai_ray.train.ppo.rewards import make_readers
from cai_ray.train.ppo.watch import read_watch_prompts
from cai_ray.train.runtime.group import check_resources, fit


def run(run: Run) -> dict[str, Any]:
    """Trains the RL-CAI policy; returns the stage's part of the manifest.

    Raises:
        InputError: prompts, reward models or the cluster do not fit the configuration.
        Stopped: a check failed or an alarm ended the run; the same command goes on from the last checkpoint.
    """
    import ray

    config, cfg = run.config, run.config.ppo
    check_resources(run, cfg)
    renderer = policy_renderer(run)
    readers = make_readers(run, cfg, renderer)
    left_out = LeftOut(config.max_error_rate)
    prompts, errors = read_training_prompts(run, renderer, readers, left_out)
    inputs = derive_id(prompts.sha, [model_sha(run.locate(source.model)) for source in cfg.rewards])
    extra: dict[str, Any] = {"prompts": ray.put(prompts), "inputs": inputs}
    gpu = uses_gpu(config)
    judge_bundle = judge.actor_resources(run)
    crowd = Crowd(tuple(needs_of(config, gpu, judge_bundle)))
    if cfg.watch.every:
        extra["watch_prompts"] = read_watch_prompts(run, renderer, readers)
    owner = open_engines(config, run.locate("sl"), renderer.end_id, gpu, judge_bundle)
    extra["engine_owner"] = owner
    extra["judge"] = judge.open_judge(run, judge_bundle, crowd) if judge_bundle else None
    try:
        out = fit(run, "ppo", loop, cfg, extra, crowd)
    finally:
        close_engines(owner)
        if judge_bundle:
            ray.kill(extra["judge"])
    return {
        "rows_in": len(prompts) + errors,
        "rows_out": out["rollouts"],
        "errors": errors,
        "prompts_left_out": dict(left_out),
        "tokens": {"generated": out["tokens"]},
        "model": "sl",
        "reward_models": {source.model: source.weight for source in cfg.rewards},
        "model_sha": folder_sha(run.path("ppo", "model")),
        **{key: out[key] for key in ("metrics", "snapshot", "alarms")},
    }
