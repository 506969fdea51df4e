"""Responses to PPO's prompts and the weights of the engines that sample them, for every rank alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from cai_ray.errors import Stopped
from cai_ray.storage.run import Run
from cai_ray.train.ppo.experience import Batch, Targets
from cai_ray.train.ppo.pool import Pool
from cai_ray.train.ppo.prompts import Prompt, Prompts
from cai_ray.train.ppo.rollout_engine import Request, Rollout
from cai_ray.train.ppo.sampling import Sampler
from cai_ray.train.ppo.scoring import probe_logprobs
from cai_ray.train.ppo.state import State
from cai_ray.train.runtime.engine import Trained
from cai_ray.train.runtime.ranks import from_first, rank
from cai_ray.train.weights.proof import TOLERANCE, SyncError, digests_of, prove
from cai_ray.train.weights.send import make_sender
from cai_ray.train.weights.state import gathered_state

FIXED_PROBES, MOVING_PROBES = 4, 12
"""Sequences that a sync is proved on: prompts that stay, and the step's rows with the largest advantages."""


class Probes(NamedTuple):
    """What the next sync is proved on."""

    ids: list[list[int]]
    """Sequences of token ids."""
    before: list[Tensor]
    """Log-probabilities of their tokens after the first, before the update."""


class Rollouts:
    """The engines as the loop sees them: take responses, send weights, prove that they arrived.

    Rank 0 alone speaks with the engines. Every rank makes every call alike, except where a method says otherwise.

    Args:
        args: what the loop was given: `engine_owner` and `prompts` (an object reference to `Prompts`).
        policy: whose weights are sent.
        state: where the run goes on from.
        total: steps of the run.
        pad_id: the token to pad with.
    """

    def __init__(
        self, run: Run, args: dict[str, Any], policy: Trained, state: State, total: int, pad_id: int
    ):
        import ray

        cfg = self._cfg = run.config.ppo
        self._policy, self._pad_id = policy, pad_id
        self._pool: Pool | None = None
        self._sampler: Sampler | None = None
        probes: list[list[int]] = []
        if rank() == 0:
            self._pool = Pool(args["engine_owner"], cfg.deadline_s)
            prompts: Prompts = ray.get(args["prompts"])
            probes = [prompts[place]["ids"] for place in range(min(FIXED_PROBES, len(prompts)))]
            self._sampler = Sampler(self._pool, prompts, cfg, run.config.seed, total, state.step, state.ahead)
        self._fixed: list[list[int]] = from_first(probes)
        self._weights = partial(gathered_state, policy)
        self._send = make_sender(
            cfg.weight_sync, self._pool, self._weights, cfg.precision, run.config.rollout_engine.span
        )

    def start(self, version: int) -> None:
        """Lets the engines sample what is to be sampled with weights number `version`, which they hold."""
        if self._sampler:
            self._sampler.start(version)

    def take(self, step: int) -> tuple[list[Prompt], list[Rollout]]:
        """The step's prompts and one response for each, as soon as they are sampled."""
        prompts, responses = from_first(self._sampler.take(step) if self._sampler else None)
        return prompts, responses

    def sample(self, requests: Sequence[Request], version: int) -> list[Rollout]:
        """One response per request by idle engines that hold weights number `version`."""
        cfg = self._cfg
        responses: list[Rollout] = from_first(
            self._pool.sample(requests, version, cfg.temperature, cfg.max_tokens) if self._pool else None
        )
        return responses

    def wait_until_idle(self) -> None:
        """Waits on rank 0 until the engines sample nothing.

        Raises:
            Exception: what sampling has failed with.
        """
        if self._sampler:
            self._sampler.wait_until_idle()

    def ahead(self, step: int) -> list[Rollout] | None:
        """The responses that the checkpoint before a step must hold (`Sampler.ahead`); None except on rank 0."""
        return self._sampler.ahead(step) if self._sampler else None

    def probes(self, batch: Batch, targets: Targets) -> Probes:
        """Prompts that stay, and rows that the update is about to move, with their log-probabilities now."""
        ids = self._fixed + most_moved(batch, targets)
        return Probes(ids, probe_logprobs(self._policy, ids, self._cfg, self._pad_id))

    def send_and_prove(self, version: int, probes: Probes | None = None) -> dict[str, float]:
        """Sends the policy's weights to idle engines as number `version` and proves that they arrived.

        Args:
            probes: from before the update; None for the first version.

        Returns:
            Metrics `sync/…`, on rank 0.

        Raises:
            Stopped: an engine holds something else.
        """
        ids, before = probes if probes else (self._fixed, None)
        now = probe_logprobs(self._policy, ids, self._cfg, self._pad_id)
        sent = self._send(version)
        # A pass of its own over the weights: what `send` believes to have sent is no evidence.
        digests = digests_of(self._weights(), self._cfg.precision)
        if self._pool is None:
            return {}
        try:
            proof = prove(self._pool, digests, version, ids, now, before, TOLERANCE[self._cfg.precision])
        except SyncError as e:
            raise Stopped(f"weight sync failed: {e}") from e
        return {
            "sync/send_s": sent.seconds,
            "sync/prove_s": proof.seconds,
            "sync/gap": proof.gap,
            "sync/mean_gap": proof.mean_gap,
            "sync/moved": proof.moved,
            "sync/shown": proof.shown,
        }

    def metrics(self) -> dict[str, float]:
        """Engines replaced until now, and the seconds that the engines took for the step taken last."""
        return {
            "rollout/replaced": self._pool.replaced if self._pool else 0,
            "time/rollout_s": self._sampler.seconds if self._sampler else 0.0,
        }


def most_moved(batch: Batch, targets: Targets) -> list[list[int]]:
    """The rows whose tokens have the largest advantages, up or down: the update is about to move these.

    They come without their last token: a row may fill the context, and an engine takes no prompt that does.
    """
    size = targets.advantages.abs().amax(1)
    return [
        batch.rows[i].ids[:-1] for i in size.argsort(descending=True, stable=True)[:MOVING_PROBES].tolist()
    ]
