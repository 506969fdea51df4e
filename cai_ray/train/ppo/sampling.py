"""Decides which responses are sampled when, and with which weights."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from cai_ray.config.ppo import PpoConfig
from cai_ray.storage.records import derive_seed
from cai_ray.train.ppo.pool import Pool
from cai_ray.train.ppo.prompts import Prompt, Prompts, step_prompts
from cai_ray.train.ppo.rollout_engine import Request, Rollout


class Sampler:
    """Gives rank 0 the prompts of each step and the responses to them.

    The engines sample while the trainer goes on: from `start`, when they hold new weights, to `wait_until_idle`,
    before they are sent the next ones. They sample the next step while the value model is updated. With
    `ppo.async_steps` they sample the step after it, during a whole step; those responses are one version old when
    they are used (`losses.importance_weights`).

    Args:
        total: steps of the run.
        step: the first step from here.
        ahead: its responses, if a checkpoint holds them.
    """

    def __init__(
        self,
        pool: Pool,
        prompts: Prompts,
        cfg: PpoConfig,
        seed: int,
        total: int,
        step: int = 0,
        ahead: list[Rollout] | None = None,
    ):
        self._pool, self._prompts, self._cfg, self._seed, self._total = pool, prompts, cfg, seed, total
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._sampled: dict[int, Future[list[Rollout]]] = {}
        if ahead is not None:
            self._sampled[step] = Future()
            self._sampled[step].set_result(ahead)
        self._seconds: dict[int, float] = {}
        self.seconds = 0.0
        """Seconds that the engines took for the step taken last."""

    def start(self, version: int) -> None:
        """Lets the engines sample the steps that are to use weights number `version`, which they hold."""
        for step in range(version, min(version + self._cfg.async_steps + 1, self._total)):
            if step not in self._sampled:
                self._sampled[step] = self._thread.submit(self._sample, step, version)

    def take(self, step: int) -> tuple[list[Prompt], list[Rollout]]:
        """The step's prompts and one response for each, as soon as they are sampled."""
        rollouts = self._sampled.pop(step).result()
        self.seconds = self._seconds.pop(step, 0.0)
        return step_prompts(self._prompts, self._cfg, step, self._seed), rollouts

    def wait_until_idle(self) -> None:
        """Waits until the engines are idle.

        Raises:
            Exception: what sampling has failed with.
        """
        for sampled in self._sampled.values():
            sampled.result()

    def ahead(self, step: int) -> list[Rollout] | None:
        """The responses that the checkpoint before a step must hold, if weights that no engine has any more made them.

        Responses by the weights in the checkpoint are sampled again and are the same.
        """
        return self._sampled[step].result() if self._cfg.async_steps and step in self._sampled else None

    def _sample(self, step: int, version: int) -> list[Rollout]:
        started = time.perf_counter()
        rollouts = sample(self._pool, self._prompts, self._cfg, step, self._seed, version)
        self._seconds[step] = time.perf_counter() - started
        return rollouts


def sample(pool: Pool, prompts: Prompts, cfg: PpoConfig, step: int, seed: int, version: int) -> list[Rollout]:
    """One response for each prompt of a step, sampled with weights number `version`."""
    start, rows = step * cfg.rollout_batch, step_prompts(prompts, cfg, step, seed)
    requests = [
        Request(row["ids"], derive_seed(seed, "rollout", row["id"], start + i)) for i, row in enumerate(rows)
    ]
    return pool.sample(requests, version, cfg.temperature, cfg.max_tokens)
