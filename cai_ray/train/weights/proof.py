"""The proof that weights arrived in the rollout engines.

`prove` believes nothing that sending says. It compares the engines with what the trainer computes in a pass of its own:

1. epoch and version: the engine's last completed load is this one;
2. a digest of each tensor's bits, exact however small the step: of the engine's parameter if it has one of that name,
   else (packed, fused) of what its loader consumed;
3. the log-probabilities that the engine's forward pass gives for probe tokens. Some are of rows that the update was
   about to move, so that old weights, or old packed copies of them, show in the results.

Digests see a step too small for the third. The third sees what digests cannot: whether the kernels use the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cai_ray.train.weights.object_store import cast


class Tolerance(NamedTuple):
    """How far an engine's log-probabilities of probe tokens may be from the trainer's."""

    mean: float
    """Bound on the mean of |engine - trainer|."""
    largest: float = math.inf
    """Bound on the largest |engine - trainer|."""


TOLERANCE = {
    "float32": Tolerance(mean=5e-5, largest=5e-5),
    "bfloat16": Tolerance(mean=0.15),
    "float16": Tolerance(mean=0.05),
}
"""By dtype. Measured: at most 6e-6 for fp32 on CPU. Half precision rounds logits of 16 to 32 to steps of 0.125, so a
single token says nothing: a real model of 135 M parameters in bf16, with nothing wrong, differs by 0.05 in the mean and
by up to 0.5 on a token."""

MOVED = 4.0
"""A token has moved if the update changed it by more than so many mean tolerances: then old weights would show."""


class SyncError(RuntimeError):
    """An engine does not hold the weights that the trainer has; the run must not go on."""


class EngineWeights(NamedTuple):
    """What an engine reports about its weights."""

    epoch: int
    version: int | None
    digests: dict[str, int]
    unloaded: list[str]
    """The engine's own parameters that the last load did not fill."""


class Proof(NamedTuple):
    """The numbers of a proof that succeeded."""

    gap: float
    """Largest |engine - trainer| over all probe tokens."""
    mean_gap: float
    """Mean of |engine - trainer| over all probe tokens, of the engine that is farthest away."""
    moved: float
    """Largest change of a probe token's log-probability by the update; NaN for the first version."""
    shown: int
    """Probe tokens on which the version before would have failed the proof."""
    seconds: float


def prove(
    pool: Any,
    digests: Mapping[str, int],
    version: int,
    probes: Sequence[Sequence[int]],
    now: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    tolerance: Tolerance,
) -> Proof:
    """Compares every engine of the pool with the trainer.

    Args:
        digests: digests of the trainer's tensors (`digests_of`), from a pass of its own.
        version: the number that the engines must hold.
        probes: sequences of token ids.
        now: for each probe, the trainer's log-probabilities of its tokens after the first, at temperature 1.
        before: the same under the version before; None if there is none.
        tolerance: differences allowed (`TOLERANCE`).

    Raises:
        SyncError: an engine holds something else, or gives other probabilities.
    """
    started = time.perf_counter()
    current = torch.cat(list(now)).double()
    old = torch.cat(list(before)).double() if before is not None else None
    gap = mean_gap = 0.0
    for number, (held, logprobs) in enumerate(pool.report(probes, version)):
        check_weights(held, digests, pool.epoch, version, f"engine {number}")
        engine_logprobs = torch.cat([torch.tensor(row, dtype=torch.float64) for row in logprobs])
        gaps = check_probes(engine_logprobs, current, old, tolerance, f"engine {number}, weights {version}")
        gap, mean_gap = max(gap, float(gaps.max())), max(mean_gap, float(gaps.mean()))
    change = (current - old).abs() if old is not None else torch.zeros(0)
    return Proof(
        gap=gap,
        mean_gap=mean_gap,
        moved=float(change.max()) if change.numel() else float("nan"),
        shown=int((change > MOVED * tolerance.mean).sum()),
        seconds=time.perf_counter() - started,
    )


def check_weights(
    held: EngineWeights, digests: Mapping[str, int], epoch: int, version: int, who: str
) -> None:
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


def check_probes(got: Tensor, now: Tensor, before: Tensor | None, tolerance: Tolerance, who: str) -> Tensor:
    """|got - now| of each token, (tokens,).

    Raises:
        SyncError: they are above the tolerance. The message says whether tokens that moved look like the version
            before.
    """
    gaps = (got - now).abs()
    mean, largest = float(gaps.mean()), float(gaps.max())
    if mean <= tolerance.mean and largest <= tolerance.largest:  # also False for NaN
        return gaps
    like = ""
    if before is not None:
        moved = (now - before).abs() > MOVED * tolerance.mean
        nearer = (got - before).abs() < gaps
        if bool(moved.any()):
            like = f"; {int((moved & nearer).sum())} of {int(moved.sum())} that moved are nearer to the weights before"
    by = f"up to {largest:.3g} (tolerance {tolerance.largest:.3g})"
    if mean > tolerance.mean:
        by = f"{mean:.3g} in the mean (tolerance {tolerance.mean:.3g}), {largest:.3g} at most"
    raise SyncError(f"{who}: log-probabilities of probe tokens differ from the trainer's by {by}{like}")


def digests_of(tensors: Iterable[tuple[str, Tensor]], dtype: str | None = None) -> dict[str, int]:
    """The digest of each tensor as it is sent, in `dtype`."""
    return {name: digest(cast(tensor, dtype)) for name, tensor in tensors}


def digest(tensor: Tensor, step: int = 1 << 22) -> int:
    """A number that depends on a tensor's bits and their order: sum of bits[i] * (2 i + 1) * odd, modulo 2^64.

    It takes integer arithmetic only, so it is the same on every device. One changed element always changes it.
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
