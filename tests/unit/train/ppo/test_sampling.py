"""When the engines sample, and when the trainer waits for them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from cai_ray.config.ppo import PpoConfig
from cai_ray.train.ppo.sampling import Sampler

PROMPTS: Any = [{"id": "p", "ids": [1, 2]}]


class BusyPool:
    """Samples until it is let go, and then ends with `outcome`."""

    def __init__(self, outcome: Any):
        self.let_go, self.outcome = threading.Event(), outcome

    def sample(self, *_: Any) -> Any:
        assert self.let_go.wait(30)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def test_no_weights_are_sent_while_engines_sample() -> None:
    """`wait_until_idle` stands before each send."""
    pool: Any = BusyPool(["a response"])
    sampler = Sampler(pool, PROMPTS, PpoConfig(rollout_batch=1, minibatch=1), seed=0, total=1)
    sampler.start(0)
    with ThreadPoolExecutor(1) as trainer:
        idle = trainer.submit(sampler.wait_until_idle)
        waiting = wait([idle], timeout=0.5).not_done
        pool.let_go.set()
        assert waiting == {idle}
        idle.result(30)
    assert sampler.take(0)[1] == ["a response"]


def test_what_sampling_fails_with_reaches_the_trainer() -> None:
    pool: Any = BusyPool(RuntimeError("the engine is gone"))
    sampler = Sampler(pool, PROMPTS, PpoConfig(rollout_batch=1, minibatch=1), seed=0, total=1)
    sampler.start(0)
    pool.let_go.set()
    with pytest.raises(RuntimeError, match="the engine is gone"):
        sampler.wait_until_idle()
