"""Sends named tensors to the rollout engines through Ray's object store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Tensors travel in objects of about this size; an engine holds one at a time."""

WORKER = "cai_ray.train.weights.worker.SyncWorker"
"""What vLLM's worker gains (`worker_extension_cls`)."""


class Packed(NamedTuple):
    """A tensor as bytes: numpy travels through Ray without a copy, but knows no bfloat16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


class Sent(NamedTuple):
    tensors: int
    bytes: int
    seconds: float


def send(pool: Any, tensors: Iterable[tuple[str, Tensor]], version: int, dtype: str | None = None) -> Sent:
    """Gives all engines of a pool these tensors as weights number `version`.

    Args:
        pool: a `rollout.Pool`; None on ranks other than the first, which only take part in gathering.
        tensors: as `fit.gathered_state` yields them, each good until the next is asked for.
        dtype: floating tensors are sent as this, the engines' dtype.
    """
    started = time.perf_counter()
    if pool is None:
        for _ in tensors:
            pass
        return Sent(0, 0, time.perf_counter() - started)
    import ray

    count, size, refs = 0, 0, []
    for chunk in pack(tensors, dtype):
        count += len(chunk)
        size += sum(item.data.nbytes for item in chunk)
        refs.append(ray.put(chunk))
    pool.update(refs, version)
    return Sent(count, size, time.perf_counter() - started)


def cast(tensor: Tensor, dtype: str | None) -> Tensor:
    return (
        tensor.detach().to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor.detach()
    )


def pack(tensors: Iterable[tuple[str, Tensor]], dtype: str | None) -> Iterator[list[Packed]]:
    """Tensors as bytes on the CPU, in lists of about CHUNK_BYTES."""
    chunk: list[Packed] = []
    for name, tensor in tensors:
        value = cast(tensor, dtype).cpu().contiguous()
        # A copy, unless it was made on the way: the next tensor may take this one's memory.
        data = value.reshape(-1).view(torch.uint8).numpy().copy()
        chunk.append(Packed(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), data))
        if sum(item.data.nbytes for item in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def unpack(chunk: Iterable[Packed]) -> Iterator[tuple[str, Tensor]]:
    for item in chunk:
        # Ray's objects are read-only memory, which torch does not like; the copy is the loader's own.
        data = torch.from_numpy(np.array(item.data))
        yield item.name, data.view(getattr(torch, item.dtype)).reshape(item.shape)
