"""What PPO's alarms say of snapshots, by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cai_ray.config.ppo import WatchConfig
from cai_ray.prompts.load import load_templates
from cai_ray.train.ppo.alarms import Snapshot, alarms, best_of, measure, phrases

CFG = WatchConfig()
SOUND = Snapshot(0, 0.0, 0.5, 20.0, 0.0, 0.0, {})


def after(step: int, **changes: Any) -> Snapshot:
    return SOUND._replace(step=step, opinion=0.6, reward=1.0, **changes)


def test_a_sound_policy_raises_no_alarm() -> None:
    assert alarms([SOUND], CFG) == [] and alarms([SOUND, after(10)], CFG) == []


def test_boilerplate_is_a_phrase_that_was_not_so_common_before() -> None:
    texts = [f"you are valid , valued , and cared for number {i}" for i in range(4)] + [
        "other words than that"
    ]
    found = phrases(texts)
    assert found["you are valid , valued"] == 0.8 and "other words than that" not in found
    now = after(10, phrases=found)
    (said,) = alarms([SOUND, now], CFG)
    assert said == "boilerplate: 80% of responses say 'you are valid , valued', 0% did before"
    common = SOUND._replace(phrases=dict.fromkeys(found, 0.6))
    assert alarms([common, now], CFG) == [], "it was nearly as common before"


@pytest.mark.parametrize(("length", "raised"), [(39.0, 0), (41.0, 1), (11.0, 0), (9.0, 1)])
def test_length_may_drift_by_a_factor(length: float, raised: int) -> None:
    assert len(alarms([SOUND, after(10, length=length)], CFG)) == raised


@pytest.mark.parametrize("name", ["refusals", "malformed"])
def test_shares_may_rise_by_so_much(name: str) -> None:
    before = SOUND._replace(**{name: 0.2})
    assert alarms([before, after(10, **{name: 0.29})], CFG) == []
    (said,) = alarms([before, after(10, **{name: 0.31})], CFG)
    assert said.startswith(f"{name}: 31% of ") and said.endswith(", 20% before")
    assert alarms([before, after(10, **{name: 0.9})], WatchConfig(**{f"max_{name}": None})) == []
    assert alarms([before, after(10, refusals=None)], CFG) == [], "no rule says what a refusal is"


def test_divergence_is_reward_up_and_opinion_down_for_some_time() -> None:
    top, up = after(10), after(20)._replace(reward=1.5, opinion=0.54)
    assert alarms([SOUND, top, up], CFG) == [], "once may be chance"
    (said,) = alarms([SOUND, top, up, up._replace(step=30, reward=1.6)], CFG)
    assert said == "divergence: reward 1 → 1.6 since step 10, second opinion 0.6 → 0.54"
    down = up._replace(step=30, reward=0.9)
    assert alarms([SOUND, top, up, down], CFG) == [], "reward falls as well: nothing is hacked"
    near = up._replace(step=30, opinion=0.56)
    assert alarms([SOUND, top, up, near], CFG) == []


def test_the_best_snapshot_is_the_second_opinions() -> None:
    history = [SOUND, after(10), after(20)._replace(reward=9.0, opinion=0.4)]
    assert best_of(history) == 1
    assert best_of([*history, after(30)]) == 3, "of equals the latest"


def test_what_is_measured() -> None:
    found = measure(
        10,
        ["sorry , no .", "gladly : first this , then that", "", "a cut off"],
        reward=0.3,
        opinion=0.6,
        lengths=[4, 8, 1, 3],
        truncated=[False, False, False, True],
        benign=[True, True, False, False],
        refusals=["sorry"],
    )
    assert (found.length, found.malformed, found.refusals) == (4.0, 0.5, 0.5)


REFUSED = ["I'm sorry, but", "Sorry, I", "I can’t help", "I cannot do", "Unfortunately, I am", "As an AI, I"]
ANSWERED = [
    "Sure, I can",
    "I can help",
    "You cannot",
    "Sorrel soup is",
    "Unfortunately, the shop",
    "I am glad",
]


@pytest.mark.parametrize("text", REFUSED + ANSWERED)
def test_the_general_rules_know_a_refusal(text: str) -> None:
    rules = load_templates("general").refusals
    assert any(re.match(rule, text) for rule in rules) == (text in REFUSED)
