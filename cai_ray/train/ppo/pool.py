"""Rank 0's hold on the rollout engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cai_ray.train.ppo.rollout_engine import Request, Rollout
from cai_ray.train.weights.proof import EngineWeights

START_S = 1800.0
"""How long an engine may take to start: a large model is read from a slow disk."""


class Pool:
    """Rank 0's hold on the engines during one start of the training group.

    Args:
        owner: from `open_engines`.
        deadline_s: how long one call may take; an engine that takes longer is replaced.
    """

    def __init__(self, owner: Any, deadline_s: float):
        import ray

        self._owner = owner
        self._deadline = deadline_s
        self.epoch, self._engines = ray.get(owner.join.remote(), timeout=START_S)
        self._sent: tuple[list[Any], int] | None = None
        self.replaced = 0
        self._each("join", [()] * len(self._engines), START_S)

    def update(self, refs: list[Any], version: int) -> None:
        """Loads the chunks behind object references into every engine. They are kept for engines made later."""
        self._sent = (refs, version)
        self._each("update", [(version, refs)] * len(self._engines))

    def sample(
        self, requests: Sequence[Request], version: int, temperature: float, max_tokens: int
    ) -> list[Rollout]:
        """One rollout per request, in their order, spread over the engines."""
        n = len(self._engines)
        parts = [list(requests[i::n]) for i in range(n)]
        answers = self._each("sample", [(version, part, temperature, max_tokens) for part in parts])
        rollouts: list[Any] = [None] * len(requests)
        for i, answer in enumerate(answers):
            rollouts[i::n] = answer
        return rollouts

    @property
    def size(self) -> int:
        return len(self._engines)

    def ask(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        """One call of every engine, in which they may wait for one another: none is replaced.

        Raises:
            RayActorError, GetTimeoutError: one died or is late.
        """
        import ray

        calls = [
            getattr(engine, method).remote(self.epoch, *given)
            for engine, given in zip(self._engines, arguments, strict=True)
        ]
        ray.get(calls, timeout=self._deadline)

    def report(
        self, probes: Sequence[Sequence[int]], version: int
    ) -> list[tuple[EngineWeights, list[list[float]]]]:
        """Every engine's (`RolloutEngine.report`)."""
        return self._each("report", [(version, [list(p) for p in probes])] * len(self._engines))

    def _each(
        self, method: str, arguments: list[tuple[Any, ...]], deadline_s: float | None = None
    ) -> list[Any]:
        """Calls every engine at once. One that dies or is late is replaced, and asked once more."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        def call(i: int) -> Any:
            return getattr(self._engines[i], method).remote(self.epoch, *arguments[i])

        calls = [call(i) for i in range(len(self._engines))]
        until = time.monotonic() + (deadline_s or self._deadline)
        answers: list[Any] = []
        for i, pending in enumerate(calls):
            try:
                answers.append(ray.get(pending, timeout=max(0.0, until - time.monotonic())))
            except (RayActorError, GetTimeoutError):
                self._replace(i, weights=method != "update")
                # A second failure is not caught: the group starts anew from its last checkpoint.
                answers.append(ray.get(call(i), timeout=self._deadline))
        return answers

    def _replace(self, index: int, weights: bool) -> None:
        import ray

        self.replaced += 1
        self._engines[index] = ray.get(self._owner.replace.remote(index), timeout=START_S)
        ray.get(self._engines[index].join.remote(self.epoch), timeout=START_S)
        if weights and self._sent is not None:
            refs, version = self._sent
            ray.get(self._engines[index].update.remote(self.epoch, version, refs), timeout=self._deadline)
