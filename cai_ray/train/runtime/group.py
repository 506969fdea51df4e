"""The group of training workers: Ray Train starts it, restarts it when it dies, and brings its errors to the driver.

A stage's loop is a function that runs on every rank. `fit` starts the group, and restarts it from the last checkpoint
when a worker dies or when the whole stage was killed and is run again. Ray Train finds the checkpoints by the run's
name, which is a hash of everything that changes the result.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from cai_ray.cluster.connect import cluster_address, uses_gpu
from cai_ray.cluster.holder import Holder
from cai_ray.cluster.interrupt import interruptible
from cai_ray.cluster.placement import ResourceNeed, bundle, check
from cai_ray.cluster.threads import Crowd, use_threads
from cai_ray.compat import ray_kv
from cai_ray.compat.ray_train import local_trainer_class
from cai_ray.config.fingerprint import fingerprint, layout_settings
from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError, OverBudget, Stopped
from cai_ray.provenance.attempts import checkpointed
from cai_ray.provenance.inputs import own_inputs
from cai_ray.stages import needs_of
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.train.runtime import metrics
from cai_ray.train.runtime.checkpoints import watch_budget
from cai_ray.train.runtime.ranks import world_size

MAX_FAILURES = 2
"""Failures without a new checkpoint that a stage survives; the next one ends it."""

Loop = Callable[[dict[str, Any]], dict[str, Any] | None]


def fit(
    run: Run,
    stage: str,
    loop: Loop,
    cfg: TrainConfig,
    extra: dict[str, Any] | None = None,
    crowd: Crowd | None = None,
) -> dict[str, Any]:
    """Runs `loop` on every rank and returns what it returned on rank 0.

    Args:
        loop: called with {"run": run, **extra}. It restores the last checkpoint itself (`checkpoints.restore`).
        extra: what the loop needs beside the run. Large data comes as object references. `inputs` is a hash of the
            data: a run on other data does not go on from these checkpoints.
        crowd: who computes in the stage; the group alone by default.

    Raises:
        InputError: the cluster is too small, checkpoints are there that do not fit, or a rank raised one.
        Stopped: a rank raised one, at a gate or an alarm.
        OverBudget: the budget is spent; the same command goes on from the last checkpoint.
    """
    check_resources(run, cfg)
    # Workers stay in the driver's directory: relative paths mean the same there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    gpu = uses_gpu(run.config)
    fs, folder = resolve(run.path(stage, "checkpoints"))
    name = _attempt_name(run, stage, cfg, (extra or {}).get("inputs"))
    _check_checkpoints(run, stage, name)
    key = f"{name}-{time.time_ns()}"
    trainer = functools.partial(
        _trainer_class(run),
        _on_each_rank,
        train_loop_config={
            "run": run,
            **(extra or {}),
            "_loop": loop,
            "_key": key,
            # A GPU does all of the work, unless the optimizer's step is on the CPU.
            "_threads": 1 if cfg.threads == "auto" and gpu and not cfg.offload_optimizer else cfg.threads,
            "_crowd": crowd or Crowd((ResourceNeed(worker_bundle(run, cfg), cfg.workers),)),
        },
        scaling_config=ScalingConfig(
            num_workers=cfg.workers,
            use_gpu=gpu,
            resources_per_worker=worker_bundle(run, cfg),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=0),  # counted by `restart_until_done`
            checkpoint_config=CheckpointConfig(num_to_keep=cfg.keep_checkpoints),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
    )
    with metrics.progress_lines(key), interruptible():
        outcome = restart_until_done(trainer, key)
    if "fault" in outcome:
        kind, text = outcome["fault"]
        raise {"InputError": InputError, "Stopped": Stopped, "OverBudget": OverBudget}[kind](text)
    return outcome["result"] or {}


def _attempt_name(run: Run, stage: str, cfg: TrainConfig, data: str | None) -> str:
    """The name by which Ray Train finds checkpoints: a hash of what they depend on."""
    needs = needs_of(stage, run.config.method)
    upstream = {need: manifest["id"] for need in needs if (manifest := run.manifest(need))}
    settings = fingerprint(cfg), layout_settings(cfg)
    return f"{stage}-{derive_id(own_inputs(run, stage), upstream, settings, data)}"


def _check_checkpoints(run: Run, stage: str, name: str) -> None:
    """Raises InputError if there are checkpoints, but only of other attempts: they would be left behind in silence.

    The pipeline has compared settings, files and models already (provenance/attempts.py); what is left are token ids,
    which a chat template or another version of a library may change.
    """
    attempts = checkpointed(run, stage)
    if attempts and name not in attempts:
        raise InputError(
            f"{run.root}: the checkpoints of {stage} were made from other training data or settings; delete "
            f"{run.path(stage)} to begin the stage again"
        )


def restart_until_done(trainer: Callable[[], Any], key: str) -> dict[str, Any]:
    """Restarts the group when it dies, without a limit as long as each start reaches a new checkpoint.

    On machines that come and go, a long run dies often and should go on. A fault that comes back at the same step
    should end it. (Ray Train counts failures over the whole run. It restarts by itself after the loss of a node.)

    Args:
        trainer: makes a Ray Train trainer for one start.
        key: where the workers leave the checkpoint they began from.

    Raises:
        WorkerGroupError: the group failed `MAX_FAILURES` times and once more without a new checkpoint.
    """
    from ray.train import WorkerGroupError

    failures, last_checkpoint = 0, None
    while True:
        try:
            return trainer().fit().return_value  # type: ignore[no-any-return]
        except WorkerGroupError:
            checkpoint = ray_kv.get(key, "from")
            failures = failures + 1 if checkpoint == last_checkpoint else 1
            last_checkpoint = checkpoint
            if failures > MAX_FAILURES:
                raise


def _trainer_class(run: Run) -> Any:
    """TorchTrainer, on a cluster that this process started without the helpers that are of no use there."""
    from ray.train.torch import TorchTrainer

    return TorchTrainer if cluster_address(run.config) else local_trainer_class()


def check_resources(run: Run, cfg: TrainConfig) -> None:
    """Checks that the cluster has room for the training group, now or when it grows.

    Raises:
        InputError: it never will have room.
    """
    group = ResourceNeed(worker_bundle(run, cfg), cfg.workers)
    remedy = "use fewer `workers`" if uses_gpu(run.config) else "use fewer `workers`, or a larger `ray.cpus`"
    check(run.config, f"training with workers={cfg.workers}", [group], remedy)


def worker_bundle(run: Run, cfg: TrainConfig) -> dict[str, float]:
    """The resources that one worker of the group takes on a node."""
    return bundle(cfg.cpus_per_worker, 1 if uses_gpu(run.config) else 0, run.config.ray.training_nodes)


def location(run: Run, model: str) -> str:
    """A model's role, folder or id in a form that means the same on every node: local folders become absolute."""
    model = run.config.model if model == "base" else model
    return os.path.abspath(model) if "://" not in model and os.path.isdir(model) else model


def _on_each_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Runs the loop; errors that the user must mend become an outcome, so that they are not tried again."""
    from ray.train import get_checkpoint

    holder, budget = Holder(), config["run"].config.budget
    watch_budget(holder if budget.given else None)
    loop, key = config.pop("_loop"), config.pop("_key")
    use_threads(config.pop("_threads"), config.pop("_crowd"))
    ray_kv.put(key, "from", str(get_checkpoint()).encode())  # the same on every rank
    if fault := ray_kv.get(key, "fault"):  # left by a rank of the group before
        return {"fault": json.loads(fault)}
    metrics.report_to(key)
    # Random initial weights (an adapter's) are the same on every rank and in every start.
    torch.manual_seed(derive_seed(config["run"].config.seed, "fit"))
    try:
        return {"result": loop(config)}
    except (InputError, Stopped) as e:
        fault = json.dumps([type(e).__name__, str(e)]).encode()
        if world_size() == 1 or isinstance(e, OverBudget):
            return {"fault": json.loads(fault)}
        ray_kv.put(key, "fault", fault)
        raise  # the other ranks may wait for this one: the group ends, and the next one ends at once
