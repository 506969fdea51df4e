"""What PPO's loop goes on from (docs/method.md, item 35), and the times of its parts."""

from __future__ import annotations

import pytest

from cai_ray.config.ppo import PpoConfig
from cai_ray.train.ppo.alarms import Snapshot
from cai_ray.train.ppo.rollout_engine import Rollout
from cai_ray.train.ppo.state import State
from cai_ray.train.runtime.timers import Timers


def test_a_checkpoint_gives_the_same_state_back() -> None:
    state = State(
        kl_coef=0.07,
        step=3,
        log=[{"step": 1, "reward/mean": 0.5}],
        tokens=120,
        prompts_consumed=96,
        ahead=[Rollout([5, 6], [-0.1, -0.2], False, 2)],
        snapshots=[Snapshot(0, 0.0, 0.5, 9.0, 0.0, None, {})],
        reward_scales=[(0.1, 2.0)],
        constitution_sha="abc",
    )
    assert State(**state.to_checkpoint()) == state
    assert set(state.to_checkpoint()) == {
        "kl_coef", "step", "log", "tokens", "prompts_consumed", "ahead", "snapshots", "reward_scales",
        "constitution_sha",
    }  # fmt: skip


def test_a_finished_step_is_counted_and_steers_the_kl_coefficient() -> None:
    cfg = PpoConfig(rollout_batch=32, kl_target=0.1, kl_horizon=320)
    state = State(kl_coef=0.05, step=1, tokens=10, prompts_consumed=32)
    state.finish_step(tokens=7, kl_reference=0.3, cfg=cfg)
    assert (state.step, state.tokens, state.prompts_consumed) == (2, 17, 64)
    assert state.kl_coef == pytest.approx(0.05 * (1 + 0.2 * 32 / 320))
    assert state.summary(cfg, Log([{"step": 2, "kl/reference": 0.3}])) == {  # type: ignore[arg-type]
        "metrics": {"kl/reference": 0.3}, "tokens": 17, "rollouts": 64,
    }  # fmt: skip


class Log:
    def __init__(self, rows: list[dict[str, float]]):
        self.rows = rows


def test_parts_that_are_timed_twice_are_added_up() -> None:
    timers = Timers()
    with timers("update_s"):
        pass
    first = timers.seconds["update_s"]
    with timers("sync_s"), timers("update_s"):
        sum(range(100_000))
    assert list(timers.metrics()) == ["time/update_s", "time/sync_s"]
    assert timers.metrics()["time/update_s"] > first >= 0
    assert timers.total == pytest.approx(sum(timers.metrics().values()))


def test_the_time_of_a_part_that_fails_counts() -> None:
    timers = Timers()
    with pytest.raises(KeyError), timers("sync_s"):
        raise KeyError
    assert "sync_s" in timers.seconds
