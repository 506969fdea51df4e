"""What a stage says of the lengths of its texts."""

from __future__ import annotations

import random
from typing import Any

from cai_ray.generate.text_lengths import TextKind, TextLengths, TextLimit, describe_lengths, summarise
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Revision

LIMIT = TextLimit("revise.max_tokens", 96)


def test_a_limit_that_held_nearly_all_is_named_by_the_texts_that_it_held() -> None:
    out = summarise(dict.fromkeys(range(1, 96), 1), {96: 5}, LIMIT)
    assert (out["texts"], out["truncated"]) == (100, 5)
    assert (out["median"], out["p95"], out["max"]) == (50, 95, 96)
    assert out["limit_for_95"] == 95, (
        "95 of 100 texts have at most 95 tokens, however long the others would be"
    )


def test_where_more_were_cut_the_limit_is_not_known() -> None:
    out = summarise(dict.fromkeys(range(1, 95), 1), {96: 6}, LIMIT)
    assert out["limit_for_95"] == "more than 96"
    assert summarise({}, {96: 3}, LIMIT)["limit_for_95"] == "more than 96"


def test_a_guess_below_a_cut_is_never_named() -> None:
    """Texts that a full context cut at 40 tokens may have become longer than all others."""
    out = summarise({80: 90}, {40: 10}, LIMIT)
    assert out["cut_below_limit"] == 10 and isinstance(out["limit_for_95"], str)
    assert out["limit_for_95"] == "more than 40"


def test_lengths_that_an_endpoint_does_not_say_are_left_out_of_the_lengths() -> None:
    out = summarise({0: 3}, {0: 1}, LIMIT)
    assert (out["texts"], out["truncated"]) == (4, 1)
    assert out["median"] is out["p95"] is out["max"] is out["limit_for_95"] is None
    assert "not known" in describe_lengths("revise", {"response": out})


def test_the_summary_is_that_of_sorted_lengths() -> None:
    rng = random.Random(0)
    for _ in range(200):
        true = [rng.randint(1, 60) for _ in range(rng.randint(1, 80))]
        limit = rng.randint(1, 60)
        whole = [n for n in true if n <= limit]
        cut = [limit for n in true if n > limit]
        kinds = [TextKind("t", "tokens", "truncated", TextLimit("s", limit))]
        lengths = TextLengths(kinds)
        rows = [{"tokens": n, "truncated": False} for n in whole] + [
            {"tokens": n, "truncated": True} for n in cut
        ]
        for start in range(0, len(rows), 7):  # as the files of a stage
            lengths.add(table(rows[start : start + 7]))
        out = lengths.summary()["t"]
        held = next((n for n in sorted(true) if sum(x <= n for x in true) >= 0.95 * len(true)), None)
        assert held is not None
        if held <= limit:
            assert out["limit_for_95"] == held
        else:
            assert out["limit_for_95"] == f"more than {limit}", "the true one is, and nothing else is known"
        assert out["max"] == max(whole + cut) and out["truncated"] == len(cut)


def table(rows: list[dict[str, Any]]) -> Any:
    columns = {"id": "r", "prompt_id": "p", "messages": [], "kind": "red_team", "family": None}
    return to_table([{**columns, **row} for row in rows], Revision)


def test_the_texts_of_steps_count_one_by_one_and_rows_without_any_not_at_all() -> None:
    step: dict[str, Any] = {
        "round": 1,
        "principle_id": "p",
        "revision_request": "r",
        "revision": "t",
        "key": "k",
    }
    kinds = [
        TextKind("response", "tokens", "truncated", LIMIT),
        TextKind("revision", "steps.revision_tokens", "steps.revision_truncated", LIMIT),
        TextKind("critique", "steps.critique_tokens", "steps.critique_truncated", LIMIT),
    ]
    lengths = TextLengths(kinds)
    lengths.add(
        table(
            [
                {"error": "failed at once"},
                {"tokens": 5, "truncated": False, "steps": []},
                {
                    "tokens": 96,
                    "truncated": True,
                    "steps": [
                        {**step, "revision_tokens": 9, "revision_truncated": False},
                        {**step, "revision_tokens": 96, "revision_truncated": True},
                    ],
                },
            ]
        )
    )
    out = lengths.summary()
    assert list(out) == ["response", "revision"]
    assert (out["response"]["texts"], out["revision"]["texts"], out["revision"]["truncated"]) == (2, 2, 1)
    line = describe_lengths("revise", out)
    assert "\n" not in line and "1 of 2 cut at revise.max_tokens=96, 95% need more than 96" in line
