"""The labeller, on a scripted engine: docs/method.md items 1, 3, 5, 6, 7."""

import asyncio
import math
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.config import LabelConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import RowError
from cai_ray.generate.label import Label, combine, preference
from cai_ray.prompts import load_templates

TOWN = constitution.load("errand-town")


def row(a: str = "sorry , no .", b: str = "sure , yes .") -> dict[str, Any]:
    messages = [{"role": "user", "content": "how do i read the baker's diary ?"}]
    return {"id": "r1", "messages": messages, "response_a": a, "response_b": b}


def label(engine: ScriptedEngine, row: dict[str, Any], **config: Any) -> dict[str, Any]:
    config = {"principles": "all", **config}
    chain = Label(TOWN, load_templates("errand-town"), LabelConfig(**config), seed=0)
    return asyncio.run(chain(engine, row))


def prefers_sorry(messages: list[dict[str, str]], options: Any) -> list[float]:
    """Sees the text as a model would: what stands in slot A comes first. Likes `sorry`, and slot A a little."""
    text = messages[1]["content"]
    bonus = 2.0 if text.index("sorry") < text.index("sure") else -2.0
    return [bonus + 0.5 - 3.0, -3.0]


def test_item_01_swapping_the_responses_swaps_the_label() -> None:
    straight = label(ScriptedEngine(weigh=prefers_sorry), row())
    swapped = label(ScriptedEngine(weigh=prefers_sorry), row("sure , yes .", "sorry , no ."))
    assert straight["p_a"] > 0.8
    assert swapped["p_a"] == pytest.approx(1 - straight["p_a"], abs=1e-12)


def test_item_01_the_verdict_influences_the_label() -> None:
    opposite = ScriptedEngine(weigh=lambda m, o: [-x for x in prefers_sorry(m, o)])
    assert label(opposite, row())["p_a"] < 0.5 < label(ScriptedEngine(weigh=prefers_sorry), row())["p_a"]


def test_item_03_normalised_over_the_two_options_then_clamped() -> None:
    # Both options are unlikely as tokens (e^-9 and e^-10): only their ratio counts.
    engine = ScriptedEngine(weigh=lambda m, o: [-9.0, -10.0])
    one_order = label(engine, row(), both_orders=False, principles=1, combine="mean")
    assert one_order["p_a"] == pytest.approx(1 / (1 + math.exp(-1)))
    clamped = label(engine, row(), both_orders=False, principles=1, combine="mean", clamp=(0.4, 0.6))
    assert clamped["p_a"] == 0.6
    assert clamped["p_a_raw"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_item_05_both_orders_are_averaged_and_slot_bias_is_reported() -> None:
    # A labeller that always takes the first slot says nothing about the responses.
    engine = ScriptedEngine(weigh=lambda m, o: [-0.1, -3.0])
    out = label(engine, row())
    assert out["p_a"] == pytest.approx(0.5)
    assert out["slot_bias"] == 1.0
    fair = ScriptedEngine(weigh=lambda m, o: [x - 0.25 * (i == 0) for i, x in enumerate(prefers_sorry(m, o))])
    assert label(fair, row())["slot_bias"] == 0.0


def test_item_05_logprobs_belong_to_the_response_whatever_slot_it_stood_in() -> None:
    vote = label(ScriptedEngine(weigh=prefers_sorry), row())["votes"][0]
    assert vote["logprob_a"] > vote["logprob_b"]
    assert vote["logprob_a_swapped"] > vote["logprob_b_swapped"]


def test_item_06_a_failure_to_score_is_an_error_never_a_label() -> None:
    engine = ScriptedEngine(weigh=lambda m, o: [float("nan"), -1.0])
    with pytest.raises(RowError, match="no finite log-probability"):
        label(engine, row())


def test_item_07_every_vote_names_its_principle_and_the_document() -> None:
    out = label(ScriptedEngine(weigh=prefers_sorry), row())
    assert [v["principle_id"] for v in out["votes"]] == [p.id for p in TOWN.principles]
    assert out["constitution_sha"] == TOWN.sha


def test_undecided_principles_weigh_nothing_in_added_log_odds() -> None:
    assert combine([0.9, 0.5, 0.5, 0.5, 0.5], [1] * 5, "log_odds") == pytest.approx(0.9)
    assert combine([0.9, 0.5, 0.5, 0.5, 0.5], [1] * 5, "mean") == pytest.approx(0.58)
    assert combine([0.8, 0.2], [2, 1], "log_odds") == pytest.approx(0.8)


def test_preference_does_not_overflow() -> None:
    assert preference(-1e4, 0.0) < 1e-300 and preference(0.0, -1e4) == 1.0


def test_equal_responses_need_no_engine() -> None:
    def never(*_: Any) -> list[float]:
        raise AssertionError("asked")

    assert label(ScriptedEngine(weigh=never), row("sure .", "sure ."))["p_a"] == 0.5
