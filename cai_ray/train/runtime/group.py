"""The group of training workers (Ray Train): started, started again where it dies, its errors given to the driver."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from cai_ray.cluster.connect import joined, uses_gpu, worker_env
from cai_ray.cluster.interrupt import interruptible
from cai_ray.cluster.meter import Holder
from cai_ray.cluster.placement import Need, bundle, check
from cai_ray.compat import ray_kv
from cai_ray.compat.ray_train import local_trainer_class
from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError, OverBudget, Stopped
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.train.runtime import metrics
from cai_ray.train.runtime.checkpoints import heed
from cai_ray.train.runtime.fingerprint import fingerprint
from cai_ray.train.runtime.ranks import world_size

# The stage gives up after so many failures and one more without a checkpoint between them.
MAX_FAILURES = 2

Loop = Callable[[dict[str, Any]], dict[str, Any] | None]


def fit(
    run: Run, stage: str, loop: Loop, cfg: TrainConfig, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs `loop` on every rank and returns what rank 0's returned.

    Args:
        loop: called with {"run": run, **extra}. It restores the last checkpoint by itself (`restore`).
        extra: what the loop needs beside the run; large data as object references, and in `inputs` a hash of
            it: a run on other data does not go on from these checkpoints.

    Raises:
        InputError: the cluster is too small, or a rank found an input at fault.
        Stopped: a rank met a gate, or the budget is spent.
    """
    check_resources(run, cfg)
    # What a worker cannot see is the driver's directory.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    gpu = uses_gpu(run.config)
    fs, folder = resolve(run.path(stage, "checkpoints"))
    name = f"{stage}-{derive_id(fingerprint(run, stage, cfg), (extra or {}).get('inputs'))}"
    key = f"{name}-{time.time_ns()}"
    trainer = functools.partial(
        _trainer_class(run),
        _on_each_rank,
        train_loop_config={"run": run, **(extra or {}), "_loop": loop, "_key": key},
        scaling_config=ScalingConfig(
            num_workers=cfg.workers,
            use_gpu=gpu,
            resources_per_worker=worker_bundle(run, cfg),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=0),  # counted by `_get_on`
            checkpoint_config=CheckpointConfig(num_to_keep=cfg.keep_checkpoints),
            worker_runtime_env={"env_vars": worker_env(run.config)},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
    )
    with metrics.progress_lines(key), interruptible():
        outcome = _get_on(trainer, key)
    if "fault" in outcome:
        kind, text = outcome["fault"]
        raise {"InputError": InputError, "Stopped": Stopped, "OverBudget": OverBudget}[kind](text)
    return outcome["result"] or {}


def _get_on(trainer: Callable[[], Any], key: str) -> dict[str, Any]:
    """Starts the group again where it dies: for ever, as long as it gets from one checkpoint to the next.

    On machines that come and go a long run dies often, and should go on; a fault that comes back at the same step
    should not be tried for ever. (Ray Train counts failures over the whole run. What it knows to be the loss of a
    node it tries again by itself.)
    """
    from ray.train import WorkerGroupError

    failures, came_from = 0, None
    while True:
        try:
            return trainer().fit().return_value  # type: ignore[no-any-return]
        except WorkerGroupError:
            now = ray_kv.get(key, "from")
            failures = failures + 1 if now == came_from else 1
            came_from = now
            if failures > MAX_FAILURES:
                raise


def _trainer_class(run: Run) -> Any:
    """TorchTrainer, on a cluster that this process started without the helpers that are of no use there."""
    from ray.train.torch import TorchTrainer

    return TorchTrainer if joined(run.config) else local_trainer_class()


def check_resources(run: Run, cfg: TrainConfig) -> None:
    """Whether the training group has room.

    Raises:
        InputError: it never will have.
    """
    group = Need(worker_bundle(run, cfg), cfg.workers)
    remedy = "use fewer `workers`" if uses_gpu(run.config) else "use fewer `workers`, or a larger `ray.cpus`"
    check(run.config, f"training with workers={cfg.workers}", [group], remedy)


def worker_bundle(run: Run, cfg: TrainConfig) -> dict[str, float]:
    """What one worker of the group takes of a node."""
    return bundle(cfg.cpus_per_worker, 1 if uses_gpu(run.config) else 0, run.config.ray.training_nodes)


def location(run: Run, which: str) -> str:
    """A model's role, folder or id in a form that means the same on every node: no path relative to here."""
    which = run.config.model if which == "base" else which
    return os.path.abspath(which) if "://" not in which and os.path.isdir(which) else which


def _on_each_rank(config: dict[str, Any]) -> dict[str, Any]:
    """The loop, with errors that are the user's to mend turned into an outcome: they are not tried again."""
    from ray.train import get_checkpoint

    holder, budget = Holder(), config["run"].config.budget
    heed(holder if budget.given else None)
    loop, key = config.pop("_loop"), config.pop("_key")
    ray_kv.put(key, "from", str(get_checkpoint()).encode())  # every rank says the same
    if fault := ray_kv.get(key, "fault"):  # told by a rank of the attempt before
        return {"fault": json.loads(fault)}
    metrics.told_to(key)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # What is drawn at random (an adapter's first weights) is the same on every rank and in every attempt.
    torch.manual_seed(derive_seed(config["run"].config.seed, "fit"))
    try:
        return {"result": loop(config)}
    except (InputError, Stopped) as e:
        fault = json.dumps([type(e).__name__, str(e)]).encode()
        if world_size() == 1 or isinstance(e, OverBudget):
            return {"fault": json.loads(fault)}
        ray_kv.put(key, "fault", fault)
        raise  # the other ranks may wait for this one: the group ends, and the next one ends at once
