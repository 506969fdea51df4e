"""The labeller, on a scripted engine: docs/method.md items 1, 3, 5, 6, 7."""

import asyncio
import math
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.config.generation import LabelConfig
from cai_ray.config.judge import JudgeConfig
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import Abstained, InputError, RowError
from cai_ray.generate.label import LabelChain
from cai_ray.judging.votes import combine, expected_score, preference
from cai_ray.prompts.check import check_judge
from cai_ray.prompts.load import load_templates
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Label

TOWN = constitution.load("errand-town")
REASONED, RATED = {"answer": "reasoned"}, {"ask": "response"}


def row(a: str = "sorry , no .", b: str = "sure , yes .") -> dict[str, Any]:
    messages = [{"role": "user", "content": "how do i read the baker's diary ?"}]
    return {"id": "r1", "messages": messages, "response_a": a, "response_b": b}


def label(engine: ScriptedEngine, row: dict[str, Any], **config: Any) -> dict[str, Any]:
    config = {"principles": "all", **config}
    templates = load_templates("general" if {"ask", "answer"} & config.keys() else "errand-town")
    chain = LabelChain(TOWN, templates, JudgeConfig(**config), seed=0)
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


def reasons(messages: list[dict[str, str]], sampling: Any) -> str:
    text = messages[0]["content"]
    return f"the {'first' if text.index('sorry') < text.index('sure') else 'second'} declines"


def follows_reasoning(messages: list[dict[str, str]], options: Any) -> list[float]:
    """Knows nothing but what was reasoned before."""
    reasoning = messages[1]["content"]
    return [-0.01, -6.0] if "first" in reasoning else [-6.0, -0.01]


REASONER = ScriptedEngine(answer=reasons, weigh=follows_reasoning)


def test_item_01_the_verdict_follows_the_reasoning_in_both_orders() -> None:
    straight = label(REASONER, row(), answer="reasoned", clamp=None)
    assert straight["p_a"] > 0.99 and straight["slot_bias"] == 0.0
    swapped = label(REASONER, row("sure , yes .", "sorry , no ."), answer="reasoned", clamp=None)
    assert swapped["p_a"] == pytest.approx(1 - straight["p_a"], abs=1e-12)
    vote = straight["votes"][0]
    assert (vote["reasoning"], vote["reasoning_swapped"]) == ("the first declines", "the second declines")
    assert vote["logprob_a"] == vote["logprob_a_swapped"] == -0.01


def test_item_01_the_seed_of_a_reasoning_is_that_of_its_texts() -> None:
    """So that swapped responses meet the same reasoning, at any temperature."""
    seeds: list[int] = []

    def note(messages: list[dict[str, str]], sampling: Any) -> str:
        seeds.append(sampling.seed)
        return "the first"

    engine = ScriptedEngine(answer=note, weigh=follows_reasoning)
    label(engine, row(), answer="reasoned", principles=1, reasoning_temperature=1.0)
    label(
        engine,
        row("sure , yes .", "sorry , no ."),
        answer="reasoned",
        principles=1,
        reasoning_temperature=1.0,
    )
    assert seeds[:2] == seeds[:1:-1] and seeds[0] != seeds[1]


def test_item_03_after_reasoning_the_label_is_clamped_and_the_raw_one_kept() -> None:
    out = label(REASONER, row(), answer="reasoned")
    assert (out["p_a"], out["p_a_raw"] > 0.99) == (0.6, True)
    assert label(REASONER, row("sure , yes .", "sorry , no ."), answer="reasoned")["p_a"] == 0.4
    assert label(REASONER, row(), answer="reasoned", clamp=(0.2, 0.7))["p_a"] == 0.7
    # Labels without reasoning are not clamped unless the configuration asks for it.
    assert JudgeConfig().clamp is None and JudgeConfig(ask="response").clamp is None
    assert JudgeConfig.model_validate(JudgeConfig(answer="reasoned", clamp=None).model_dump()).clamp is None


def likes_sorry(messages: list[dict[str, str]], options: Any) -> list[float]:
    best = 8 if "sorry" in messages[0]["content"] else 3
    return [-5.0 - abs(i - best) for i in range(len(options))]


def test_item_01_a_rating_of_each_response_by_itself() -> None:
    asked: list[str] = []

    def weigh(messages: list[dict[str, str]], options: Any) -> list[float]:
        asked.append(messages[0]["content"])
        assert len(options) == 10
        return likes_sorry(messages, options)

    out = label(ScriptedEngine(weigh=weigh), row(), ask="response", principles=1)
    vote = out["votes"][0]
    for name, best in (("score_a", 8), ("score_b", 3)):
        w = [math.exp(-abs(i - best)) for i in range(10)]
        assert vote[name] == pytest.approx(sum((i + 1) * x for i, x in enumerate(w)) / sum(w))
    assert out["p_a"] == pytest.approx(1 / (1 + math.exp(vote["score_b"] - vote["score_a"])))
    assert out["p_a"] == out["p_a_raw"] and out["slot_bias"] is None
    assert len(asked) == 2 and not any("sorry" in text and "sure" in text for text in asked)
    swapped = label(
        ScriptedEngine(weigh=weigh), row("sure , yes .", "sorry , no ."), ask="response", principles=1
    )
    assert swapped["p_a"] == pytest.approx(1 - out["p_a"], abs=1e-12)


def test_item_03_a_score_is_normalised_over_its_tokens() -> None:
    assert expected_score([-9.0] * 10) == pytest.approx(5.5)
    assert expected_score([-2000.0] * 9 + [-1000.0]) == pytest.approx(10)
    assert expected_score([math.log(0.01), math.log(0.03)]) == pytest.approx(1.75)


@pytest.mark.parametrize("settings", [{}, REASONED, RATED], ids=["logprob", "reasoned", "response"])
@pytest.mark.parametrize("answer", [[float("nan")], [float("-inf")], []])
def test_item_06_one_principle_abstains_and_the_others_vote(
    settings: dict[str, Any], answer: list[float]
) -> None:
    """By privacy the engine's answer lacks a number: never a guess, and the label is that of the others."""
    silent = TOWN["privacy"]

    def weigh(messages: list[dict[str, str]], options: Any) -> list[float]:
        text = " ".join(m["content"] for m in messages)
        full = likes_sorry(messages, options) if settings == RATED else [-0.1, -2.0]
        about_it = silent.comparison in text or silent.text in text
        return (full[: len(options) - 1] + answer) if about_it else full

    out = label(ScriptedEngine(weigh=weigh), row(), **settings, both_orders=False)
    mute = [v for v in out["votes"] if v["p_a"] is None]
    assert [v["principle_id"] for v in mute] == ["privacy"]
    assert "no finite log-probability for principle privacy" in mute[0]["abstained"]
    others = [v["p_a"] for v in out["votes"] if v["p_a"] is not None]
    assert len(others) == 4 and out["p_a_raw"] == pytest.approx(sum(others) / 4)
    stored = to_table([out], Label).to_pylist()[0]["votes"]
    assert [v["p_a"] for v in stored] == [v["p_a"] for v in out["votes"]]


def test_item_06_an_engine_that_fails_is_no_abstention() -> None:
    """A label of those principles that happened to get through would depend on the weather."""

    def fails(error: RowError) -> Any:
        def weigh(messages: list[dict[str, str]], options: Any) -> list[float]:
            if TOWN["privacy"].comparison in messages[2]["content"]:
                raise error
            return [-0.1, -2.0]

        return ScriptedEngine(weigh=weigh)

    with pytest.raises(RowError, match="endpoint"):
        label(fails(RowError("the endpoint goes on failing")), row())
    votes = label(fails(Abstained("no option is among the likeliest")), row())["votes"]
    assert [v["abstained"] for v in votes if v["p_a"] is None] == ["no option is among the likeliest"]


def test_item_06_without_reasoning_there_is_no_verdict() -> None:
    with pytest.raises(RowError, match="reasoning is empty for principle"):
        label(ScriptedEngine(answer=lambda m, s: " \n", weigh=follows_reasoning), row(), answer="reasoned")


def test_item_38_a_set_without_the_parts_that_a_judge_needs() -> None:
    for settings, says in (
        (
            REASONED,
            r"x\.answer=reasoned: template set errand-town has no reasoning and no verdict.*x\.answer: logprob",
        ),
        (RATED, r"x\.ask=response: template set errand-town has no rating and no scores.*x\.ask: pair"),
    ):
        check_judge(load_templates("general"), JudgeConfig(**settings), "x")
        with pytest.raises(InputError, match=says):
            check_judge(load_templates("errand-town"), JudgeConfig(**settings), "x")
    check_judge(load_templates("errand-town"), JudgeConfig(), "x")
    with pytest.raises(ValueError, match=r"label\.judge\.ask=response has no slots"):
        LabelConfig(judge=RATED, gates={"max_slot_bias": 0.5})


@pytest.mark.parametrize("ask", ["pair", "response"])
def test_a_negative_question_counts_the_other_way_round(ask: str) -> None:
    """Its log-probabilities stay those of the options as they were put."""
    turned = constitution.parse(
        TOWN.model_dump() | {"principles": [p.model_dump() | {"form": "negative"} for p in TOWN.principles]},
        "t",
    )
    config = JudgeConfig(principles="all", ask=ask)
    templates = load_templates("errand-town" if ask == "pair" else "general")
    likes = ScriptedEngine(weigh=prefers_sorry if ask == "pair" else likes_sorry)
    plain, other = (
        asyncio.run(LabelChain(document, templates, config, seed=0)(likes, row()))
        for document in (TOWN, turned)
    )
    assert plain["p_a"] > 0.5 and other["p_a"] == pytest.approx(1 - plain["p_a"], abs=1e-12)
    for a, b in zip(plain["votes"], other["votes"], strict=True):
        assert b["p_a"] == pytest.approx(1 - a["p_a"], abs=1e-12) and b.get("logprob_a") == a.get("logprob_a")
