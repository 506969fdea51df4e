"""`cai-ray constitution test`: which rows are asked, and what is made of the answers."""

from __future__ import annotations

from typing import Any

from cai_ray import constitution
from cai_ray.studies import examples


def document(**changes: Any) -> constitution.Constitution:
    def principle(name: str, violates: list[str], follows: list[str]) -> dict[str, Any]:
        sides = {"violates": violates, "follows": follows}
        made = {side: [{"prompt": "p", "response": r} for r in texts] for side, texts in sides.items()}
        texts = dict.fromkeys(("title", "text", "critique_request", "revision_request", "comparison"), name)
        return {"id": name, **texts, "examples": made} | changes.get(name, {})

    # `both` breaks either principle, and is an example of each.
    principles = [principle("a", ["bad a", "both"], ["fine"]), principle("b", ["bad b", "both"], [])]
    return constitution.parse({"name": "test", "principles": principles}, "test")


def answered(doc: constitution.Constitution, at_stake: set[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        row | {"at_stake": (row["principle_id"], row["response"]) in at_stake, "error": None}
        for row in examples.rows(doc)
    ]


def test_every_example_is_asked_under_every_principle_once() -> None:
    asked = sorted((r["principle_id"], r["response"], r["violates"]) for r in examples.rows(document()))
    assert asked == [
        ("a", "bad a", True), ("a", "bad b", False), ("a", "both", True), ("a", "fine", False),
        ("b", "bad a", False), ("b", "bad b", True), ("b", "both", True), ("b", "fine", False),
    ]  # fmt: skip
    assert len({r["id"] for r in examples.rows(document())}) == 8


def test_a_principle_that_is_off_is_not_asked() -> None:
    asked = examples.rows(document(b={"enabled": False}))
    assert {r["principle_id"] for r in asked} == {"a"} and {r["response"] for r in asked} == {
        "bad a",
        "both",
        "fine",
    }


def test_recall_specificity_and_confusion() -> None:
    doc = document()
    found = examples.summary(
        answered(doc, {("a", "bad a"), ("a", "both"), ("b", "bad b"), ("b", "bad a")}), doc
    )
    assert found["recall"] | {"low": 0, "high": 0} == {"value": 0.75, "n": 4, "low": 0, "high": 0}
    assert found["specificity"]["value"] == 0.75 and found["specificity"]["n"] == 4
    assert found["by_principle"]["b"]["recall"]["value"] == 0.5
    assert found["by_principle"]["b"]["specificity"]["value"] == 0.5
    # What breaks both is taken for neither's other.
    assert found["confusion"] == {"a": {"a": 1.0, "b": 1.0}, "b": {"a": 0.0, "b": 0.5}}
    assert (found["examples"], found["errors"]) == (4, 0)


def test_what_failed_is_counted_and_left_out() -> None:
    doc = document()
    rows = answered(doc, {("a", "bad a")})
    rows = [r | {"error": "x", "at_stake": None} if r["response"] == "both" else r for r in rows]
    found = examples.summary(rows, doc)
    assert found["errors"] == 2 and found["recall"]["n"] == 2 and found["recall"]["value"] == 0.5
