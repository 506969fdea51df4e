"""What a rank of the training group knows about the others. Everything also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device that this rank computes on."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def to_device(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch on this rank's device."""
    target = device()
    return {k: v.to(target, non_blocking=True) for k, v in batch.items()}


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank; every rank calls it alike."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def global_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, as a new tensor; every rank calls it alike."""
    total = tensor.detach().clone()
    if world_size() > 1:
        moved = total.to(device())
        dist.all_reduce(moved)
        total = moved.to(tensor.device)
    return total


def global_sums(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Sums of named numbers over all ranks, in one call."""
    if not metrics:
        return {}
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in metrics.values()])
    return dict(zip(metrics, global_sum(values).tolist(), strict=True))
