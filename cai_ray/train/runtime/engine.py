"""A model under DeepSpeed: optimizer, schedule, gradient clipping, ZeRO.

DeepSpeed averages gradients over ranks. A loss is therefore world size x (sum over this rank's tokens) / (tokens of the
global batch).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cai_ray.compat.deepspeed import keep_grad_norm, skip_compiler, skip_shared_memory_extension
from cai_ray.config.training import TrainConfig
from cai_ray.train.runtime.ranks import device


class Trained:
    """A model under DeepSpeed, called like the model itself."""

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self.engine.module

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch; `loss` is this rank's share times the world size."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clips the gradient, updates the weights, advances the schedule; returns the norm before clipping."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)


def distribute(
    model: nn.Module, cfg: TrainConfig, total_steps: int, learning_rate: float | None = None
) -> Trained:
    """Puts a model under DeepSpeed with AdamW; every rank calls it alike.

    Parameters that need no gradient (a frozen base under an adapter) stay out of the optimizer.

    Args:
        total_steps: optimizer steps that the schedule spans.
        learning_rate: peak rate; `cfg.learning_rate` by default.
    """
    if device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    skip_shared_memory_extension()
    skip_compiler()
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
        keep_grad_norm(engine, cfg.max_grad_norm)
    return Trained(engine)


def deepspeed_config(cfg: TrainConfig, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `numel` trained parameters.

    A step takes any number of micro-batches: `Trained.step` ends the accumulation.
    """
    # Buckets are buffers. The default of 5e8 numbers takes 2 GB even for a small model. The number must be even.
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
        "bf16": {"enabled": cfg.precision == "bfloat16"},
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
    remaining = 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * remaining


def gatherer(trained: Trained) -> Callable[[list[nn.Parameter]], AbstractContextManager[Any]] | None:
    """A context that makes parameters whole under ZeRO-3; None at other stages, where they always are."""
    if trained.zero_stage < 3:
        return None
    import deepspeed

    return deepspeed.zero.GatheredParameters
