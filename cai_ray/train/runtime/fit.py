"""Ray Train and DeepSpeed, in one place: the group of workers, the trained engine, checkpoints and metrics.

A stage's loop is a function that runs on every rank; what it needs of a distributed system is here. `fit` starts
the group and starts it again from the last checkpoint where a worker dies, or where the whole stage was killed
and is run again: Ray Train finds the checkpoints by the run's name, which is a hash of everything that
changes the result. Losses are world size x (sum over tokens) / (tokens of the global batch), since DeepSpeed
averages gradients over ranks.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cai_ray.cluster.connect import uses_gpu, worker_env
from cai_ray.cluster.interrupt import interruptible
from cai_ray.cluster.meter import Holder
from cai_ray.cluster.placement import Need, bundle, check
from cai_ray.compat import ray_kv
from cai_ray.config.ppo import WatchConfig
from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError, OverBudget, Stopped
from cai_ray.prompts.load import load_templates
from cai_ray.stages import upstream_of
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.train.models import save_folder, state_items
from cai_ray.train.runtime import metrics
from cai_ray.train.runtime.checkpoints import checkpoint_due as checkpoint_due
from cai_ray.train.runtime.checkpoints import heed
from cai_ray.train.runtime.checkpoints import restore as restore
from cai_ray.train.runtime.checkpoints import save_checkpoint as save_checkpoint
from cai_ray.train.runtime.checkpoints import wait_until_saved as wait_until_saved
from cai_ray.train.runtime.metrics import Log as Log
from cai_ray.train.runtime.ranks import device as device
from cai_ray.train.runtime.ranks import global_sum as global_sum
from cai_ray.train.runtime.ranks import global_sums as global_sums
from cai_ray.train.runtime.ranks import rank as rank
from cai_ray.train.runtime.ranks import to_device as to_device
from cai_ray.train.runtime.ranks import world_size as world_size

# The stage gives up after so many failures and one more without a checkpoint between them.
MAX_FAILURES = 2
# How a stage is run, not what it yields: changing these goes on from the same checkpoints. Another number of workers,
# or other micro-batches, add the same numbers in another order, and so may differ in the last digits.
_HOW = {"checkpoint_every", "keep_checkpoints", "cpus_per_worker", "workers", "micro_batch_tokens"}
_BOUNDS = {"on_alarm", "patience"} | {n for n in WatchConfig.model_fields if n.startswith("max_")}

Loop = Callable[[dict[str, Any]], dict[str, Any] | None]


# ---------------------------------------------------------------------------------------------- the driver's side


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
    """TorchTrainer, without its helpers where the cluster is ours alone and ends with this process.

    Three actors of 120 MB each wait for what cannot happen there: the preemption of a node, a controller that
    dies and leaves a placement group behind, a dataset (we pass none). The second asks the dashboard, which such
    a cluster does not have, and holds up the end of every run for 12 s.
    """
    from ray.train.torch import TorchTrainer

    if run.config.ray.address or os.environ.get("RAY_ADDRESS"):
        return TorchTrainer
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    class Lean(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            needless = ("PlacementGroupCleanerCallback", "DatasetsCallback")
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in needless]

    return Lean


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


def fingerprint(run: Run, stage: str, cfg: TrainConfig) -> str:
    """A hash of what a stage's result depends on: a changed one starts anew beside the old checkpoints."""
    upstream = {s: m["id"] for s in upstream_of(stage, run.config.method) if (m := run.manifest(s))}
    settings = cfg.model_dump(mode="json", exclude={**dict.fromkeys(_HOW, True), "watch": _BOUNDS})
    model, templates = model_sha(run.model("base")), load_templates(run.config.templates)
    return derive_id(stage, settings, run.config.seed, templates.sha, model, upstream)


def location(run: Run, which: str) -> str:
    """A model's role, folder or id in a form that means the same on every node: no path relative to here."""
    which = run.config.model if which == "base" else which
    return os.path.abspath(which) if "://" not in which and os.path.isdir(which) else which


# ------------------------------------------------------------------------------------------------ on every rank


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


class Trained:
    """A model under DeepSpeed. Called like the model; `module` is the model itself."""

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient. `loss` is this rank's share times the world size (module docstring)."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clips, updates the weights, moves the schedule on; returns the gradient's norm before clipping."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)


def distribute(
    model: nn.Module, cfg: TrainConfig, total_steps: int, learning_rate: float | None = None
) -> Trained:
    """Puts a model under DeepSpeed with AdamW and the configured schedule over `total_steps` steps.

    Every rank calls it alike. Parameters that need no gradient (a frozen base under an adapter) stay out of the
    optimizer.
    """
    if device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from torch.optim.lr_scheduler import LambdaLR

    # Compiled at the first start for 40 s otherwise, and of no use to training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=cfg.learning_rate if learning_rate is None else learning_rate,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=device().type == "cuda" and not cfg.offload_optimizer,
    )
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, cfg, total_steps))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(cfg, sum(p.numel() for p in trainable)),
        dist_init_required=False if dist.is_initialized() else None,
    )
    if cfg.zero_stage == 0:
        # Stage 0 clips by itself and forgets the norm.
        def clip() -> None:
            engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), cfg.max_grad_norm)

        engine.clip_fp32_gradients = clip
    return Trained(engine)


def deepspeed_config(cfg: TrainConfig, numel: int) -> dict[str, Any]:
    """Any number of micro-batches per step: `Trained.step` is what ends an accumulation."""
    # Buckets are buffers: the default of 5e8 numbers is 2 GB, also for a small model.
    # DeepSpeed wants an even number.
    bucket = int(min(5e8, -(-numel // 1024) * 1024))
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    zero["overlap_comm"] = False
    if cfg.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = min(bucket, int(5e7))
    if cfg.offload_optimizer and cfg.zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device().type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def schedule(step: int, cfg: TrainConfig, total_steps: int) -> float:
    """The factor on the learning rate at a step, counted from 0: never 0 at the first one (docs/method.md, item 34)."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    done = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    if cfg.schedule == "constant":
        return 1.0
    left = 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


# ------------------------------------------------------------------------------------------------------- weights


def gather(trained: Trained) -> Callable[[list[nn.Parameter]], AbstractContextManager[Any]] | None:
    """Makes parameters whole for a while under ZeRO-3; None where they always are."""
    if trained.zero_stage < 3:
        return None
    import deepspeed

    return deepspeed.zero.GatheredParameters


def gathered_state(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one by one, adapters merged, a tied head included; every rank iterates to the end.

    A tensor is good until the next one is asked for.
    """
    with torch.no_grad():
        yield from state_items(trained.module, gather(trained))


def save_model(trained: Trained, source: str, uri: str) -> None:
    """Writes a Hugging Face folder with the tokenizer of `source`; every rank calls it, rank 0 writes."""
    state: dict[str, Tensor] = {}
    for name, tensor in gathered_state(trained):
        if rank() == 0:
            state[name] = tensor.detach().to("cpu", copy=True)
    if rank() == 0:
        save_folder(trained.module, source, uri, state)
    if world_size() > 1:
        dist.barrier()
