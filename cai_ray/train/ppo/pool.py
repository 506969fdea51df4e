"""Rank 0's access to the rollout engines: calls all of them and replaces those that die or are stuck."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cai_ray.train.ppo.rollout_engine import Request, Rollout
from cai_ray.train.weights.proof import EngineWeights

START_S = 1800.0
"""Seconds that an engine may take to start: a large model may be read from a slow disk."""


class Pool:
    """The rollout engines during one start of the training group.

    Making a pool joins the engines and raises the sync epoch: an engine answers only for the epoch and version that it
    is asked for. An engine that dies or passes its deadline is killed, replaced and sent the weights again.

    Args:
        owner: the actor that owns the engines (`engine_owner.open_engines`).
        deadline_s: seconds that one call may take.

    Raises:
        RayActorError, GetTimeoutError: from any call, an engine fails, and so does the one that replaces it.
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
        """Loads the chunks behind object references into every engine; they are kept for engines made later."""
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
        """The number of engines."""
        return len(self._engines)

    def ask(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        """Calls a method of every engine, in which engines may wait for one another; none is replaced.

        Raises:
            RayActorError, GetTimeoutError: an engine died or is late.
        """
        import ray

        calls = [
            getattr(engine, method).remote(self.epoch, *values)
            for engine, values in zip(self._engines, arguments, strict=True)
        ]
        ray.get(calls, timeout=self._deadline)

    def report(
        self, probes: Sequence[Sequence[int]], version: int
    ) -> list[tuple[EngineWeights, list[list[float]]]]:
        """Each engine's report (`RolloutEngine.report`)."""
        return self._each("report", [(version, [list(p) for p in probes])] * len(self._engines))

    def _each(
        self, method: str, arguments: list[tuple[Any, ...]], deadline_s: float | None = None
    ) -> list[Any]:
        """Calls all engines at once. One that dies or is late is replaced and called once more."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        def call(i: int) -> Any:
            return getattr(self._engines[i], method).remote(self.epoch, *arguments[i])

        calls = [call(i) for i in range(len(self._engines))]
        deadline = time.monotonic() + (deadline_s or self._deadline)
        answers: list[Any] = []
        for i, pending in enumerate(calls):
            try:
                answers.append(ray.get(pending, timeout=max(0.0, deadline - time.monotonic())))
            except (RayActorError, GetTimeoutError):
                self._replace(i, weights=method != "update")
                # A second failure is not caught: the group restarts from its last checkpoint.
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
