"""Sends named tensors to the rollout engines through Ray's object store.

send.py has the ways through vLLM's own interface. An engine loads the tensors with vLLM's layerwise reload, which
packs them for its kernels as a load from disk does. The head of a model with tied embeddings must be among them: vLLM's
CPU build computes with a packed copy of the head, which a new embedding alone does not renew (`state.state_items`
yields it).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Size of the objects that tensors travel in; an engine holds one at a time."""


class Packed(NamedTuple):
    """A tensor as bytes: numpy arrays travel through Ray without a copy, but numpy has no bfloat16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


class Sent(NamedTuple):
    """What a send moved, and how long it took."""

    tensors: int
    bytes: int
    seconds: float


def send(pool: Any, tensors: Iterable[tuple[str, Tensor]], version: int, dtype: str | None = None) -> Sent:
    """Loads these tensors into all engines of a pool as weights number `version`.

    Args:
        pool: a `ppo.pool.Pool`; None on ranks other than 0, which only take part in gathering.
        tensors: as `state.gathered_state` yields them, each valid until the next is asked for.
        dtype: the engines' dtype, as which floating tensors are sent.

    Raises:
        RayActorError, GetTimeoutError: an engine fails, and so does the one that replaces it.
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
    """A floating tensor as the named dtype, any other as it is; without its graph."""
    return (
        tensor.detach().to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor.detach()
    )


def pack(tensors: Iterable[tuple[str, Tensor]], dtype: str | None) -> Iterator[list[Packed]]:
    """Tensors as bytes on the CPU, in lists of about `CHUNK_BYTES`."""
    chunk: list[Packed] = []
    for name, tensor in tensors:
        value = cast(tensor, dtype).cpu().contiguous()
        # A copy: the next tensor may take this one's memory.
        data = value.reshape(-1).view(torch.uint8).numpy().copy()
        chunk.append(Packed(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), data))
        if sum(item.data.nbytes for item in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def unpack(chunk: Iterable[Packed]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a list from `pack`, as copies of their own."""
    for item in chunk:
        # Ray's objects are read-only memory, of which torch makes no tensor without a warning.
        data = torch.from_numpy(np.array(item.data))
        yield item.name, data.view(getattr(torch, item.dtype)).reshape(item.shape)
