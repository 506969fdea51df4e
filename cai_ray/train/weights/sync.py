"""Weights from the trainer to the rollout engines, and the proof that they arrived.

`send` hands named tensors to every engine through Ray's object store; transfer.py has the ways by vLLM's own interface.
An engine loads them by vLLM's layerwise reload, which packs them for its kernels as a load from disk does. The head
of a model with tied embeddings must be among them: the CPU build of vLLM computes with a packed copy of the head,
which a new embedding alone does not renew (`models.state_items` yields it).

`prove` believes nothing that `send` says. It compares, with what the trainer computes in a pass of its own:

1. epoch and version: the engine's last completed load is this one;
2. a digest of each tensor's bits, exact, however small the step: of the engine's parameter where it has one of
   that name, else (packed, fused) of what its loader consumed;
3. the log-probabilities that the engine's forward pass gives for probe tokens, some of them of rows that the
   update was about to move, so that old weights, or old packed copies of them, show in the results.

Digests see a step too small for the third; the third sees what digests cannot: whether the kernels use it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Tensors travel in objects of about this size; an engine holds one at a time."""

TOLERANCE = {"float32": 5e-5, "bfloat16": 0.15, "float16": 0.05}
"""Largest |engine - trainer| on a probe token. fp32 on CPU: 6e-6 measured; bf16: 0.07."""

MOVED = 4.0
"""A token is moved when the update changed it by more than so many tolerances: then old weights would show."""

WORKER = "cai_ray.train.weights.worker.SyncWorker"
"""What vLLM's worker gains (`worker_extension_cls`)."""


class SyncError(RuntimeError):
    """An engine does not hold the weights that the trainer has; the run must not go on."""


class Packed(NamedTuple):
    """A tensor as bytes: numpy travels through Ray without a copy, but knows no bfloat16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


class Held(NamedTuple):
    """What an engine says of its weights."""

    epoch: int
    version: int | None
    digests: dict[str, int]
    unloaded: list[str]
    """The engine's own parameters that the last load did not fill."""


class Sent(NamedTuple):
    tensors: int
    bytes: int
    seconds: float


class Proof(NamedTuple):
    gap: float
    """Largest |engine - trainer| over all probe tokens."""
    moved: float
    """Largest change of a probe token's log-probability by the update; nan for the first version."""
    shown: int
    """Probe tokens on which the version before would have failed the proof."""
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


def prove(
    pool: Any,
    digests: Mapping[str, int],
    version: int,
    probes: Sequence[Sequence[int]],
    now: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    tolerance: float,
) -> Proof:
    """Compares every engine of the pool with the trainer.

    Args:
        digests: of the trainer's tensors (`digests_of`), from a pass of its own.
        probes: sequences of token ids.
        now: per probe, the trainer's log-probabilities of its tokens after the first, temperature 1.
        before: the same under the version before; None if there is none.

    Raises:
        SyncError: an engine holds something else, or gives other probabilities.
    """
    started = time.perf_counter()
    wanted = torch.cat(list(now)).double()
    old = torch.cat(list(before)).double() if before is not None else None
    gap = 0.0
    for number, (held, logprobs) in enumerate(pool.report(probes, version)):
        check_held(held, digests, pool.epoch, version, f"engine {number}")
        got = torch.cat([torch.tensor(row, dtype=torch.float64) for row in logprobs])
        gap = max(gap, check_probes(got, wanted, old, tolerance, f"engine {number}, weights {version}"))
    change = (wanted - old).abs() if old is not None else torch.zeros(0)
    return Proof(
        gap=gap,
        moved=float(change.max()) if change.numel() else float("nan"),
        shown=int((change > MOVED * tolerance).sum()),
        seconds=time.perf_counter() - started,
    )


def check_held(held: Held, digests: Mapping[str, int], epoch: int, version: int, who: str) -> None:
    """Raises SyncError unless an engine holds exactly these tensors, of this epoch and version."""
    if (held.epoch, held.version) != (epoch, version):
        raise SyncError(
            f"{who} holds weights {held.version} of epoch {held.epoch}, not {version} of epoch {epoch}"
        )
    for problem, names in (
        ("did not receive", sorted(digests.keys() - held.digests.keys())),
        ("received the unknown", sorted(held.digests.keys() - digests.keys())),
        ("did not load its", held.unloaded),
        ("holds other values in", sorted(n for n, d in digests.items() if held.digests.get(n, d) != d)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SyncError(f"{who}, weights {version}: {problem} {names[0]}{more}")


def check_probes(got: Tensor, now: Tensor, before: Tensor | None, tolerance: float, who: str) -> float:
    """The largest |got - now| over tokens.

    Raises:
        SyncError: it is above the tolerance; the message says if the tokens that moved look like the version before.
    """
    gaps = (got - now).abs()
    worst = float(gaps.max())
    if worst <= tolerance:  # also False for NaN
        return worst
    like = ""
    if before is not None:
        moved = (now - before).abs() > MOVED * tolerance
        nearer = (got - before).abs() < gaps
        if bool(moved.any()):
            like = f"; {int((moved & nearer).sum())} of {int(moved.sum())} that moved are nearer to the weights before"
    raise SyncError(
        f"{who}: log-probabilities of probe tokens differ from the trainer's by up to {worst:.3g} "
        f"(tolerance {tolerance:.3g}){like}"
    )


def digests_of(tensors: Iterable[tuple[str, Tensor]], dtype: str | None = None) -> dict[str, int]:
    return {name: digest(cast(tensor, dtype)) for name, tensor in tensors}


def digest(tensor: Tensor, step: int = 1 << 22) -> int:
    """A number of a tensor's bits and their order: sum of bits[i] * (2 i + 1) * odd, modulo 2^64.

    Integer arithmetic only, so that it is the same on every device. One changed element always changes it.
    """
    flat = tensor.detach().reshape(-1)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    flat = flat.view(width)
    total = 0
    for start in range(0, flat.numel(), step):
        bits = flat[start : start + step].to(torch.int64)
        weights = torch.arange(start, start + bits.numel(), device=bits.device) * 2 + 1
        # 64-bit products wrap around, as they should; the factor spreads small bits over the word.
        total += int((bits * weights * 0x9E3779B97F4A7C1).sum())
    return (total + tensor.numel()) & 0xFFFFFFFFFFFFFFFF


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
